// Page keys as they are to be rounded: errors of channels made up for by those behind them, with the
// rule of `pagedkv.tiers.codec.rounding.compensated`. The 64 tokens of a SIMD group share their scales.

FN float over_group(float a, float b) {
  float x = max_of(a, b);
  UNROLL for (u32 mask = 1; mask < 32; mask *= 2) x = max_of(x, simd_shuffle_xor(x, mask));
  return x;
}

// Grid: x groups of 64 tokens, y KV heads.
FN void compensate(u32 lane, u32, u32 number, u32 head, u32, SHARED errors, BUFFER keys, BUFFER feedback, OUTPUT out) {
  u64 token = token_of(number, head, lane);
  BUFFER first = keys + token * ROW;
  BUFFER second = keys + (token + 32) * ROW;
  BUFFER gains = feedback + head * (DIM * ROW);
  for (int start = 0; start < DIM; start += BLOCK) {
    Moves move = moves(errors, gains, lane, start);
    UNROLL for (int c = 0; c < BLOCK; c += 2) {
      u32 pairs[2] = {load(first, (start + c) / 2), load(second, (start + c) / 2)};
      u32 moved[2] = {};
      UNROLL for (int part = 0; part < 2; part++) {
        float plain[2], x[2], e[2];
        UNROLL for (int n = 0; n < 2; n++) {
          plain[n] = of_pair(pairs[n], part);
          u32 bits = float_to_half(finite(plain[n] - move.by[c + part][n]));
          moved[n] |= bits << (16 * part);
          x[n] = half_to_float(bits);
        }
        Affine a = affine<BITS, TRIM>({-over_group(-x[0], -x[1]), over_group(x[0], x[1])});
        float inverse = divide(1.0f, a.scale);
        UNROLL for (int n = 0; n < 2; n++)
          e[n] = finite(rounded<BITS>(x[n], a, inverse) * a.scale + a.bias - plain[n]);
        errors[32 * (start + c + part) + lane] = h2_pack(e[0], e[1]);
      }
      store(out, token * ROW + (start + c) / 2, moved[0]);
      store(out, (token + 32) * ROW + (start + c) / 2, moved[1]);
    }
  }
}
