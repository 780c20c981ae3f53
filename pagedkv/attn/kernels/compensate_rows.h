// Page values as they are to be rounded, with the rule of `pagedkv.tiers.codec.rounding.compensated_rows`:
// the channels of a token share their scales, GROUP of them each, and the ends of a group stay.

CONSTANT int SCALES = (DIM + GROUP - 1) / GROUP;

struct Scale {
  Edges ends;
  Affine affine;
  float inverse;
};

// Of a token's group that begins at a channel. Pages have zeros behind the last channel.
FN Scale scale_of(BUFFER row, int start) {
  Edges e = {of_pair(load(row, start / 2), 0), of_pair(load(row, start / 2), 0)};
  for (int i = start; i < start + GROUP; i += 2) {
    u32 pair = i < DIM ? load(row, i / 2) : 0;
    UNROLL for (int part = 0; part < 2; part++) {
      e.low = -max_of(-e.low, -of_pair(pair, part));
      e.high = max_of(e.high, of_pair(pair, part));
    }
  }
  Affine a = affine<BITS, TRIM>(e);
  return {e, a, divide(1.0f, a.scale)};
}

FN float within(float x, float plain, Edges e) {
  return plain == e.low || plain == e.high ? plain : -max_of(-max_of(x, e.low), -e.high);
}

// Grid: x groups of 64 tokens, y KV heads.
FN void compensate_rows(u32 lane, u32, u32 number, u32 head, u32, SHARED errors, BUFFER values, BUFFER feedback, OUTPUT out) {
  u64 token = token_of(number, head, lane);
  BUFFER first = values + token * ROW;
  BUFFER second = values + (token + 32) * ROW;
  BUFFER gains = feedback + head * (DIM * ROW);
  Scale scales[SCALES][2];
  UNROLL for (int g = 0; g < SCALES; g++) {
    scales[g][0] = scale_of(first, g * GROUP);
    scales[g][1] = scale_of(second, g * GROUP);
  }
  for (int start = 0; start < DIM; start += BLOCK) {
    Moves move = moves(errors, gains, lane, start);
    UNROLL for (int c = 0; c < BLOCK; c += 2) {
      u32 pairs[2] = {load(first, (start + c) / 2), load(second, (start + c) / 2)};
      u32 moved[2] = {};
      UNROLL for (int part = 0; part < 2; part++) {
        float e[2];
        UNROLL for (int n = 0; n < 2; n++) {
          Scale s = scales[(start + c) / GROUP][n];
          float plain = of_pair(pairs[n], part);
          u32 bits = float_to_half(within(plain - move.by[c + part][n], plain, s.ends));
          moved[n] |= bits << (16 * part);
          e[n] = finite(rounded<BITS>(half_to_float(bits), s.affine, s.inverse) * s.affine.scale + s.affine.bias - plain);
        }
        errors[32 * (start + c + part) + lane] = h2_pack(e[0], e[1]);
      }
      store(out, token * ROW + (start + c) / 2, moved[0]);
      store(out, (token + 32) * ROW + (start + c) / 2, moved[1]);
    }
  }
}
