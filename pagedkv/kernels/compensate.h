// Page keys as they are to be rounded: errors of channels made up for by those behind them, with the
// rule of `pagedkv.tiers.rounding.compensated`.
//
// A SIMD group has 64 tokens of one head, which share their scales: a lane has two of them, 32 apart.
// What a token's errors move is the same token, so a lane reads nobody's errors but its own, from
// threadgroup memory: a word per channel and lane, the errors of both tokens in float16.
// Words of `feedback`: of all heads, row by row; zero but for rows of a block and columns before it.

CONSTANT int GROUPS = PAGE_TOKENS / 64;
CONSTANT int ROW = KEY_DIM / 2;  // words

FN float over_group(float a, float b) {
  float x = max_of(a, b);
  UNROLL for (u32 mask = 1; mask < 32; mask *= 2) x = max_of(x, simd_shuffle_xor(x, mask));
  return x;
}
FN float finite(float x) { return max_of(-65504.0f, -max_of(-65504.0f, -x)); }

// Grid: x groups of 64 tokens, y KV heads.
FN void compensate(u32 lane, u32, u32 number, u32 head, u32, SHARED errors, BUFFER keys, BUFFER feedback, OUTPUT out) {
  u64 token = (u64(number / GROUPS) * HEADS + head) * PAGE_TOKENS + 64 * (number % GROUPS) + lane;
  BUFFER first = keys + token * ROW;
  BUFFER second = keys + (token + 32) * ROW;
  BUFFER gains = feedback + head * (KEY_DIM * ROW);
  for (int start = 0; start < KEY_DIM; start += BLOCK) {
    float moves[BLOCK][2] = {};
    for (int i = 0; i < start; i += 2) {
      u32 e = errors[32 * i + lane], f = errors[32 * (i + 1) + lane];
      float a[2] = {half_to_float(e & 0xffff), half_to_float(e >> 16)};
      float b[2] = {half_to_float(f & 0xffff), half_to_float(f >> 16)};
      UNROLL for (int c = 0; c < BLOCK; c++) {
        u32 gain = load(gains, (start + c) * ROW + i / 2);
        float g = half_to_float(gain & 0xffff), h = half_to_float(gain >> 16);
        UNROLL for (int n = 0; n < 2; n++) moves[c][n] += g * a[n] + h * b[n];
      }
    }
    UNROLL for (int c = 0; c < BLOCK; c += 2) {
      u32 pairs[2] = {load(first, (start + c) / 2), load(second, (start + c) / 2)};
      u32 moved[2] = {};
      UNROLL for (int part = 0; part < 2; part++) {
        float plain[2], x[2], e[2];
        UNROLL for (int n = 0; n < 2; n++) {
          plain[n] = half_to_float((pairs[n] >> (16 * part)) & 0xffff);
          u32 bits = float_to_half(finite(plain[n] - moves[c + part][n]));
          moved[n] |= bits << (16 * part);
          x[n] = half_to_float(bits);
        }
        Affine a = affine<KEY_BITS, KEY_TRIM>({-over_group(-x[0], -x[1]), over_group(x[0], x[1])});
        float inverse = divide(1.0f, a.scale);
        UNROLL for (int n = 0; n < 2; n++)
          e[n] = finite(rounded<KEY_BITS>(x[n], a, inverse) * a.scale + a.bias - plain[n]);
        errors[32 * (start + c + part) + lane] = h2_pack(e[0], e[1]);
      }
      store(out, token * ROW + (start + c) / 2, moved[0]);
      store(out, (token + 32) * ROW + (start + c) / 2, moved[1]);
    }
  }
}
