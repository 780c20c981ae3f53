// Reading pages: eight codes of two neighbours at a time, as pairs of exact 16-bit floats.
//
// A unit is eight consecutive codes: eight tokens of one channel (keys) or eight channels of one
// token (values), BITS bytes long. Two units that are summed over together (two channels, two
// tokens) are joined into pairs, which is the operand order of matrix units.

struct Unit {
  u32 w[4];
};

FN constexpr int words_of(int bits) { return bits == 16 ? 4 : bits == 8 ? 2 : 1; }

template <int BITS, class Memory> FN Unit load_unit(Memory p, int row, int unit) {
  Unit u;
  if constexpr (BITS == 16) {
    Words4 v = load4(p, row + 4 * unit);
    u.w[0] = v.x; u.w[1] = v.y; u.w[2] = v.z; u.w[3] = v.w;
  } else if constexpr (BITS == 8) {
    Words2 v = load2(p, row + 2 * unit);
    u.w[0] = v.x; u.w[1] = v.y;
  } else if constexpr (BITS == 4) {
    u.w[0] = load(p, row + unit);
  } else if constexpr (BITS == 3) {
    // Three bytes that may lie across two words.
    int at = (3 * unit) >> 2, shift = 8 * ((3 * unit) & 3);
    u32 low = load(p, row + at) >> shift;
    u.w[0] = shift > 8 ? low | (load(p, row + at + 1) << (32 - shift)) : low;
  } else {
    u.w[0] = load(p, row + (unit >> 1)) >> (16 * (unit & 1));
  }
  return u;
}

// COUNT neighbouring units, with as few loads as alignment allows.
template <int BITS, int COUNT, class Memory> FN void load_units(Memory p, int row, int first, THREAD Unit* out) {
  if constexpr (BITS * COUNT == 16 && BITS != 16 && BITS != 3) {
    Words4 v = load4(p, row + first * BITS / 4);
    u32 w[4] = {v.x, v.y, v.z, v.w};
    UNROLL for (int i = 0; i < COUNT; i++) {
      if constexpr (BITS == 2) {
        out[i].w[0] = w[i / 2] >> (16 * (i & 1));
      } else {
        UNROLL for (int k = 0; k < words_of(BITS); k++) out[i].w[k] = w[i * words_of(BITS) + k];
      }
    }
  } else if constexpr (BITS * COUNT == 8 && BITS != 3) {
    Words2 v = load2(p, row + first * BITS / 4);
    u32 w[2] = {v.x, v.y};
    UNROLL for (int i = 0; i < COUNT; i++) {
      if constexpr (BITS == 2) {
        out[i].w[0] = w[i / 2] >> (16 * (i & 1));
      } else {
        UNROLL for (int k = 0; k < words_of(BITS); k++) out[i].w[k] = w[i * words_of(BITS) + k];
      }
    }
  } else if constexpr (BITS == 2 && COUNT == 2) {
    u32 w = load(p, row + (first >> 1));
    out[0].w[0] = w;
    out[1].w[0] = w >> 16;
  } else {
    UNROLL for (int i = 0; i < COUNT; i++) out[i] = load_unit<BITS>(p, row, first + i);
  }
}

// bfloat16 pairs as float16 pairs; what float16 cannot hold is clamped, as in the page codec.
FN u32 bfloat_pair(u32 x) {
  float low = as_float(x << 16), high = as_float(x & 0xffff0000u);
  low = max_of(-65504.0f, -max_of(-65504.0f, -low));
  high = max_of(-65504.0f, -max_of(-65504.0f, -high));
  return h2_pack(low, high);
}

// The BITS-wide fields at bit `pos` of both halves. A field inside the mantissa of 1024 adds
// code * 2^pos to it exactly; one multiply-add takes the 1024 off and scales back, exactly too.
template <int BITS> FN u32 field(u32 pair, int pos) {
  u32 mask = ((1u << BITS) - 1) << pos;
  u32 magic = and_or(pair, mask * 0x10001u, 0x64006400u);
  u32 factor = u32(15 - pos) << 10, offset = 0x8000u | (u32(25 - pos) << 10);
  return h2_fma(magic, factor * 0x10001u, offset * 0x10001u);
}

// out[j] = (code j of a, code j of b) as float16; for 16 bits the numbers themselves.
template <int BITS, bool BFLOAT> FN void unpack(THREAD const Unit& a, THREAD const Unit& b, THREAD u32* out) {
  if constexpr (BITS == 16) {
    UNROLL for (int j = 0; j < 4; j++) {
      out[2 * j] = join_at<0>(a.w[j], b.w[j]);
      out[2 * j + 1] = join_high(a.w[j], b.w[j]);
    }
    if constexpr (BFLOAT) {
      UNROLL for (int j = 0; j < 8; j++) out[j] = bfloat_pair(out[j]);
    }
  } else if constexpr (BITS == 8) {
    UNROLL for (int k = 0; k < 2; k++) {
      out[4 * k] = field<8>(join_at<0>(a.w[k], b.w[k]), 0);
      out[4 * k + 1] = field<8>(join_at<1>(a.w[k], b.w[k]), 0);
      out[4 * k + 2] = field<8>(join_at<2>(a.w[k], b.w[k]), 0);
      out[4 * k + 3] = field<8>(join_at<3>(a.w[k], b.w[k]), 0);
    }
  } else if constexpr (BITS == 4) {
    u32 pair[4] = {join_at<0>(a.w[0], b.w[0]), join_at<1>(a.w[0], b.w[0]),
                   join_at<2>(a.w[0], b.w[0]), join_at<3>(a.w[0], b.w[0])};
    UNROLL for (int j = 0; j < 8; j++) out[j] = field<4>(pair[j / 2], 4 * (j & 1));
  } else if constexpr (BITS == 3) {
    UNROLL for (int k = 0; k < 3; k++) {
      u32 pair = join_at<0>(a.w[0] >> (9 * k), b.w[0] >> (9 * k));
      UNROLL for (int j = 3 * k; j < 8 && j < 3 * k + 3; j++) out[j] = field<3>(pair, 3 * (j - 3 * k));
    }
  } else {
    u32 pair = join_at<0>(a.w[0], b.w[0]);
    UNROLL for (int j = 0; j < 5; j++) out[j] = field<2>(pair, 2 * j);
    UNROLL for (int j = 5; j < 8; j++) out[j] = field<2>(pair >> 10, 2 * (j - 5));
  }
}
