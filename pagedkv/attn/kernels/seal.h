// Sealing: 16-bit keys and values to pages, with the arithmetic of `pagedkv.tiers.codec`.
//
// One threadgroup seals 64 tokens of one head; its SIMD groups share no memory and never wait for
// each other. A lane holds runs of 32 numbers, for which codes of any width fill whole words: 32
// channels of a token, or 32 tokens of two channels. Loads of a SIMD group lie side by side in both
// cases, so keys are transposed on their way through registers. Two lanes share a group of 64.

CONSTANT int RUNS = PADDED_VALUE_DIM / 32;  // runs of a token's values
CONSTANT int KEY_TURNS = (KEY_DIM + 31) / 32;
CONSTANT int THREADS = 32 * WARPS;
typedef Layout<KEY_BITS, VALUE_BITS> Page;
static_assert(Page::words <= PAGE_WORDS, "the parts of a page are longer than the page");

// 32 numbers as 16-bit pairs.
struct Run {
  u32 pair[16];
};
struct Codes {
  u32 w[16];
};
FN float number(THREAD const Run& run, int i) { return half_to_float((run.pair[i / 2] >> (16 * (i & 1))) & 0xffff); }

FN Edges edges(THREAD const Run& run) {
  Edges e = {number(run, 0), number(run, 0)};
  UNROLL for (int i = 1; i < 32; i++) {
    e.low = -max_of(-e.low, -number(run, i));
    e.high = max_of(e.high, number(run, i));
  }
  return e;
}

// The edges of a group whose other half is in the lane `mask` away.
FN Edges joined(Edges e, u32 mask) {
  return {-max_of(-e.low, -simd_shuffle_xor(e.low, mask)), max_of(e.high, simd_shuffle_xor(e.high, mask))};
}

template <int BITS> FN Codes encode(THREAD const Run& run, Affine a) {
  float inverse = divide(1.0f, a.scale);
  Codes out = {};
  UNROLL for (int i = 0; i < 32; i++) {
    u32 code = u32(rounded<BITS>(number(run, i), a, inverse));
    int word = i * BITS / 32, shift = i * BITS % 32;
    out.w[word] |= code << shift;
    if (shift + BITS > 32) out.w[word + 1] |= code >> (32 - shift);
  }
  return out;
}

template <int COUNT> FN void store_words(OUTPUT to, u64 at, THREAD const u32* w) {
  if constexpr (COUNT % 4 == 0) {
    UNROLL for (int i = 0; i < COUNT; i += 4) store4(to, at + i, {w[i], w[i + 1], w[i + 2], w[i + 3]});
  } else if constexpr (COUNT == 2) {
    store2(to, at, {w[0], w[1]});
  } else {
    UNROLL for (int i = 0; i < COUNT; i++) store(to, at + i, w[i]);
  }
}

// Coded pages are made from float16, whatever the cache's type; 16-bit pages keep the bits.
FN u32 taken(u32 pair) {
  if constexpr (HOT_BFLOAT && Page::coded)
    return bfloat_pair(pair);
  else
    return pair;
}

// 32 tokens of the lane's two channels; lanes 16 to 31 have the other 32 tokens of the same ones.
FN void seal_keys(int lane, int turn, BUFFER keys, OUTPUT out, u64 page, int head, int group) {
  int channel = 32 * turn + 2 * (lane & 15), upper = lane >> 4;
  bool there = KEY_DIM % 32 == 0 || channel < KEY_DIM;
  BUFFER column = keys + (upper * 32 * (KEY_DIM / 2) + (there ? channel / 2 : 0));
  u32 rows[32];
  UNROLL for (int i = 0; i < 32; i++) rows[i] = taken(load(column, i * (KEY_DIM / 2)));
  Run runs[2];
  UNROLL for (int i = 0; i < 16; i++) {
    runs[0].pair[i] = join_at<0>(rows[2 * i], rows[2 * i + 1]);
    runs[1].pair[i] = join_high(rows[2 * i], rows[2 * i + 1]);
  }
  UNROLL for (int c = 0; c < 2; c++) {
    int row = head * KEY_DIM + channel + c;
    u64 to = page + u64(row) * Page::key_row + (2 * group + upper) * KEY_BITS;
    if constexpr (Page::coded) {
      Affine a = affine<KEY_BITS, KEY_TRIM>(joined(edges(runs[c]), 16));
      Codes codes = encode<KEY_BITS>(runs[c], a);
      if (there) {
        store_words<KEY_BITS>(out, to, codes.w);
        u64 k = 2 * page + u64(row) * PAGE_GROUPS + group;
        store16(out, k + (upper ? Page::key_biases : Page::key_scales), float_to_half(upper ? a.bias : a.scale));
      }
    } else {
      if (there) store_words<16>(out, to, runs[c].pair);
    }
  }
}

// 32 channels of a token; a group of 64 is two neighbouring lanes'. Channels that pad a group are
// zeros and belong to it.
FN void seal_values(int item, BUFFER values, OUTPUT out, u64 page, int head, int group) {
  int token = item / RUNS, run = item % RUNS, row = head * PAGE_TOKENS + 64 * group + token;
  u64 to = page + Page::values + u64(row) * Page::value_row + run * VALUE_BITS;
  Run numbers = {};
  UNROLL for (int i = 0; i < 4; i++) {
    if (VALUE_DIM % 32 == 0 || 32 * run + 8 * i < VALUE_DIM) {
      Words4 v = load4(values, token * (VALUE_DIM / 2) + 16 * run + 4 * i);
      numbers.pair[4 * i] = taken(v.x);
      numbers.pair[4 * i + 1] = taken(v.y);
      numbers.pair[4 * i + 2] = taken(v.z);
      numbers.pair[4 * i + 3] = taken(v.w);
      if (!Page::coded) store4(out, to + 4 * i, v);
    }
  }
  if constexpr (Page::coded) {
    Edges e = edges(numbers);
    if (VALUE_GROUP == 64) e = joined(e, 1);
    Affine a = affine<VALUE_BITS, VALUE_TRIM>(e);
    Codes codes = encode<VALUE_BITS>(numbers, a);
    store_words<VALUE_BITS>(out, to, codes.w);
    if (run % (VALUE_GROUP / 32) == 0) {
      u64 k = 2 * page + u64(row) * VALUE_GROUPS + run / (VALUE_GROUP / 32);
      store16(out, k + Page::value_scales, float_to_half(a.scale));
      store16(out, k + Page::value_biases, float_to_half(a.bias));
    }
  }
}

// Grid: x groups of 64 tokens, y KV heads.
// params: first hot token of the first page, hot capacity.
FN void seal_pages(u32 lane, u32 warp, u32 number, u32 head, u32, SHARED, BUFFER params, BUFFER hot_keys,
                   BUFFER hot_values, OUTPUT out) {
  u64 page = u64(number / PAGE_GROUPS) * PAGE_WORDS;
  int group = number % PAGE_GROUPS;
  u64 token = u64(head) * load(params, 1) + load(params, 0) + 64 * number;
  // Turns at keys are longer, so they come first.
  for (int turn = warp; turn < KEY_TURNS + 2 * RUNS; turn += WARPS) {
    if (turn < KEY_TURNS)
      seal_keys(lane, turn, hot_keys + token * (KEY_DIM / 2), out, page, head, group);
    else
      seal_values(32 * (turn - KEY_TURNS) + lane, hot_values + token * (VALUE_DIM / 2), out, page, head, group);
  }
  // The rest of the page is zero; each threadgroup of the page writes its share.
  int share = head * PAGE_GROUPS + group;
  for (int i = Page::words + share * THREADS + 32 * warp + lane; i < PAGE_WORDS; i += HEADS * PAGE_GROUPS * THREADS)
    store(out, page + i, 0);
}
