// What errors of channels move those behind them by, as `pagedkv.tiers.codec.rounding` does it.
//
// A SIMD group has 64 tokens of one head: a lane has two of them, 32 apart. What a token's errors
// move is the same token, so a lane reads nobody's errors but its own, from threadgroup memory: a
// word per channel and lane, the errors of both tokens in float16.
// Words of feedback: of all heads, row by row; zero but for rows of a block and columns before it.

CONSTANT int GROUPS = PAGE_TOKENS / 64;
CONSTANT int ROW = DIM / 2;  // words

// The first of a lane's tokens, of all pages and heads; the number is that of a group of 64 tokens.
FN u64 token_of(u32 number, u32 head, u32 lane) {
  return (u64(number / GROUPS) * HEADS + head) * PAGE_TOKENS + 64 * (number % GROUPS) + lane;
}

struct Moves {
  float by[BLOCK][2];
};

// Of the block that begins at a channel.
FN Moves moves(SHARED errors, BUFFER gains, u32 lane, int start) {
  Moves out = {};
  for (int i = 0; i < start; i += 2) {
    u32 e = errors[32 * i + lane], f = errors[32 * (i + 1) + lane];
    float a[2] = {half_to_float(e & 0xffff), half_to_float(e >> 16)};
    float b[2] = {half_to_float(f & 0xffff), half_to_float(f >> 16)};
    UNROLL for (int c = 0; c < BLOCK; c++) {
      u32 gain = load(gains, (start + c) * ROW + i / 2);
      float g = half_to_float(gain & 0xffff), h = half_to_float(gain >> 16);
      UNROLL for (int n = 0; n < 2; n++) out.by[c][n] += g * a[n] + h * b[n];
    }
  }
  return out;
}

FN float finite(float x) { return max_of(-65504.0f, -max_of(-65504.0f, -x)); }
FN float of_pair(u32 pair, int part) { return half_to_float((pair >> (16 * part)) & 0xffff); }
