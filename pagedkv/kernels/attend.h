// Decode attention over a page table: one threadgroup attends one split of one KV head.
//
// Every SIMD group takes tiles of 64 tokens and keeps its own running softmax (the online softmax
// of FlashAttention); the groups merge at the end, and splits merge in another kernel (merge.h).
// Scores and outputs are matrix products with keys and values as the left operand (16 tokens or
// channels by 16) and up to eight query rows as the right one, so a page's codes go from memory to
// the matrix unit through registers alone. Key scales are folded into the queries, once per tile;
// key biases are a product of their own, the same for all tokens of the tile.
//
// Lane (g, t) holds token 8g + j of a tile in its j-th score, and the query rows 2t and 2t + 1.

FN constexpr int least(int a, int b) { return a < b ? a : b; }

constexpr int STEPS = KEY_DIM / 16;
constexpr int ROW_BLOCKS = ROWS > 8 ? 2 : 1;
constexpr int UNITS = PADDED_VALUE_DIM / 8;
constexpr int LANE_UNITS = (UNITS + 7) / 8;  // units of eight channels that one lane holds
constexpr int VALUE_GROUPS = PADDED_VALUE_DIM / VALUE_GROUP;
constexpr int PAGE_GROUPS = PAGE_TOKENS / 64;
// 16-bit pages store no padded channels.
constexpr int ROW_UNITS = VALUE_DIM / 8;

// Shared memory, in words: queries, then per SIMD group the scales of its tile. The merge at the
// end uses the same words for the output of all rows.
constexpr int QUERY_WORDS = STEPS * ROW_BLOCKS * 64;
constexpr int META_WORDS = KEY_DIM + VALUE_GROUPS * 64;
constexpr int MERGE_WORDS = LANE_UNITS * 64 * ROW_BLOCKS * 8;
constexpr int STAT_WORDS = WARPS * ROW_BLOCKS * 16;
constexpr int MAIN_WORDS = QUERY_WORDS + WARPS * META_WORDS;
constexpr int SHARED_WORDS = (MAIN_WORDS > MERGE_WORDS ? MAIN_WORDS : MERGE_WORDS) + STAT_WORDS;

struct Softmax {
  float output[ROW_BLOCKS][LANE_UNITS][4][4];
  float peak[ROW_BLOCKS][2];   // of the scores, times log2(e)
  float total[ROW_BLOCKS][2];  // this lane's tokens only, until the end
};

struct Scores {
  float s[ROW_BLOCKS][4][4];
};

struct Place {
  u32 lane, warp, g, t;
};

// The channel that stands at index k of a step of 16: a lane's four channels are neighbours.
FN u32 channel_of(u32 k) { return k < 8 ? 4 * (k >> 1) + (k & 1) : 4 * ((k - 8) >> 1) + 2 + (k & 1); }
FN u32 b_k(Place at, u32 half) { return B_ALONG_K ? 2 * at.t + half : at.g; }
FN u32 b_column(Place at, u32 half) { return B_ALONG_K ? at.g : 2 * at.t + half; }

FN u32 to_half(u32 bits, bool bfloat) {
  return bfloat ? bfloat_pair(bits) & 0xffff : bits;
}

// Queries as right operands, ready to use: two words per lane, step and row block.
FN void stage_queries(Place at, SHARED shared, BUFFER q, u32 first_row, u32 rows_before) {
  for (u32 i = at.warp; i < STEPS * ROW_BLOCKS * 2; i += WARPS) {
    u32 half = i & 1, block = (i >> 1) % ROW_BLOCKS, step = (i >> 1) / ROW_BLOCKS;
    u32 word = 0;
    for (u32 h = 0; h < 2; h++) {
      u32 row = first_row + 8 * block + b_column(at, h);
      u32 channel = 16 * step + channel_of(b_k(at, h) + 8 * half);
      u32 bits = 0;
      if (row < ROWS) bits = to_half(load16(q, (rows_before + row) * KEY_DIM + channel), QUERY_BFLOAT);
      word |= bits << (16 * h);
    }
    shared[((step * ROW_BLOCKS + block) * 32 + at.lane) * 2 + half] = word;
  }
}

// Scales and biases of a tile: keys as pairs of channels, values as pairs of tokens 8 apart.
template <int KEY_BITS, int VALUE_BITS>
FN void stage_scales(Place at, SHARED meta, BUFFER page, u32 head, u32 group) {
  constexpr u32 key_codes = HEADS * KEY_DIM * (PAGE_TOKENS * KEY_BITS / 32);
  constexpr u32 key_scales = HEADS * KEY_DIM * PAGE_GROUPS;  // in 16-bit numbers
  for (u32 pair = at.lane; pair < KEY_DIM / 2; pair += 32) {
    u32 i = 2 * key_codes + (head * KEY_DIM + 2 * pair) * PAGE_GROUPS + group;
    meta[2 * pair] = load16(page, i) | (load16(page, i + PAGE_GROUPS) << 16);
    meta[2 * pair + 1] = load16(page, i + key_scales) | (load16(page, i + key_scales + PAGE_GROUPS) << 16);
  }
  constexpr u32 value_codes = HEADS * PAGE_TOKENS * (PADDED_VALUE_DIM * VALUE_BITS / 32);
  constexpr u32 value_scales = HEADS * PAGE_TOKENS * VALUE_GROUPS;
  constexpr u32 start = 2 * (key_codes + key_scales + value_codes);
  u32 token = 64 * group + 16 * (at.lane >> 3) + (at.lane & 7);
  u32 i = start + (head * PAGE_TOKENS + token) * VALUE_GROUPS;
  UNROLL for (u32 v = 0; v < VALUE_GROUPS; v++) {
    u32 at_v = i + v, later = at_v + 8 * VALUE_GROUPS;
    SHARED out = meta + KEY_DIM + (v * 32 + at.lane) * 2;
    out[0] = load16(page, at_v) | (load16(page, later) << 16);
    out[1] = load16(page, at_v + value_scales) | (load16(page, later + value_scales) << 16);
  }
}

// A query operand times the key scales of its channels.
FN u32 scaled(Place at, u32 q, SHARED meta, u32 step, u32 half) {
  if (B_ALONG_K) return h2_mul(q, meta[2 * (8 * step + 2 * at.t + half)]);
  u32 channel = 16 * step + channel_of(at.g + 8 * half);
  u32 scale = (meta[channel & ~1u] >> (16 * (channel & 1))) & 0xffff;
  return h2_mul(q, scale * 0x10001u);
}

template <int KEY_BITS>
FN void score_page(Place at, THREAD Scores& scores, SHARED queries, SHARED meta,
                   BUFFER page, u32 head, u32 group) {
  constexpr bool coded = KEY_BITS != 16;
  if constexpr (coded) {
    float bias[ROW_BLOCKS][4] = {};
    UNROLL for (u32 step = 0; step < STEPS; step++) {
      u32 low = meta[2 * (8 * step + 2 * at.t) + 1], high = meta[2 * (8 * step + 2 * at.t + 1) + 1];
      UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++) {
        SHARED q = queries + ((step * ROW_BLOCKS + b) * 32 + at.lane) * 2;
        mma(bias[b], low, low, high, high, q[0], q[1]);
      }
    }
    UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
      UNROLL for (u32 m = 0; m < 4; m++)
        UNROLL for (u32 e = 0; e < 4; e++) scores.s[b][m][e] = bias[b][e];
  }
  constexpr u32 row_words = PAGE_TOKENS * KEY_BITS / 32;
  constexpr int batch = least(STEPS, 8 / words_of(KEY_BITS));
  u32 base = head * KEY_DIM * row_words + group * (2 * KEY_BITS);
  UNROLL for (int first = 0; first < STEPS; first += batch) {
    Unit units[batch][4];
    UNROLL for (int i = 0; i < batch; i++)
      UNROLL for (int c = 0; c < 4; c++)
        if (first + i < STEPS)
          units[i][c] = load_unit<KEY_BITS>(page, base + (16 * (first + i) + 4 * at.t + c) * row_words, at.g);
    UNROLL for (int i = 0; i < batch; i++) {
      u32 step = first + i;
      if (step >= STEPS) break;
      u32 low[8], high[8];
      unpack<KEY_BITS, HOT_BFLOAT>(units[i][0], units[i][1], low);
      unpack<KEY_BITS, HOT_BFLOAT>(units[i][2], units[i][3], high);
      UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++) {
        SHARED q = queries + ((step * ROW_BLOCKS + b) * 32 + at.lane) * 2;
        u32 q0 = q[0], q1 = q[1];
        if constexpr (coded) {
          q0 = scaled(at, q0, meta, step, 0);
          q1 = scaled(at, q1, meta, step, 1);
        }
        UNROLL for (u32 m = 0; m < 4; m++)
          mma(scores.s[b][m], low[2 * m], low[2 * m + 1], high[2 * m], high[2 * m + 1], q0, q1);
      }
    }
  }
}

// Hot keys: rows of 16-bit channels. Rows past the end read the last one; they are masked later.
FN void score_hot(Place at, THREAD Scores& scores, SHARED queries, BUFFER keys, u32 last) {
  UNROLL for (u32 m = 0; m < 4; m++) {
    u32 row0 = least(8 * at.g + 2 * m, last) * (KEY_DIM / 2);
    u32 row1 = least(8 * at.g + 2 * m + 1, last) * (KEY_DIM / 2);
    UNROLL for (u32 step = 0; step < STEPS; step++) {
      Words2 x = load2(keys, row0 + 8 * step + 2 * at.t), y = load2(keys, row1 + 8 * step + 2 * at.t);
      if constexpr (HOT_BFLOAT) {
        x = {bfloat_pair(x.x), bfloat_pair(x.y)};
        y = {bfloat_pair(y.x), bfloat_pair(y.y)};
      }
      UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++) {
        SHARED q = queries + ((step * ROW_BLOCKS + b) * 32 + at.lane) * 2;
        mma(scores.s[b][m], x.x, y.x, x.y, y.y, q[0], q[1]);
      }
    }
  }
}

// Scores become weights of the running softmax, in place; `limit` counts the visible tokens.
// Weights carry a factor 2^15: float16 then resolves them down to 2^-39 of the largest.
FN void softmax(Place at, THREAD Scores& scores, THREAD Softmax& state, THREAD const int (&limit)[ROW_BLOCKS][2],
                bool all_visible) {
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++) {
    UNROLL for (u32 r = 0; r < 2; r++) {
      float peak = LOWEST;
      UNROLL for (u32 m = 0; m < 4; m++) {
        UNROLL for (u32 h = 0; h < 2; h++) {
          float s = scores.s[b][m][2 * h + r] * SCALE_LOG2E;
          if (!all_visible && int(8 * at.g + 2 * m + h) >= limit[b][r]) s = LOWEST;
          scores.s[b][m][2 * h + r] = s;
          peak = max_of(peak, s);
        }
      }
      peak = max_of(state.peak[b][r], max_over_rows(peak));
      float keep = exp2_fast(state.peak[b][r] - peak), sum = 0;
      state.peak[b][r] = peak;
      UNROLL for (u32 m = 0; m < 4; m++) {
        UNROLL for (u32 h = 0; h < 2; h++) {
          float s = scores.s[b][m][2 * h + r];
          float p = exp2_fast(s - peak + 15.0f);
          if (!all_visible && s == LOWEST) p = 0;
          scores.s[b][m][2 * h + r] = p;
          sum += p;
        }
      }
      state.total[b][r] = state.total[b][r] * keep + sum;
      UNROLL for (u32 w = 0; w < LANE_UNITS; w++)
        UNROLL for (u32 i = 0; i < 4; i++) {
          state.output[b][w][i][r] *= keep;
          state.output[b][w][i][2 + r] *= keep;
        }
    }
  }
}

FN void weigh_unit(THREAD Softmax& state, u32 w, THREAD const u32 (&first)[8], THREAD const u32 (&second)[8],
                   THREAD const u32 (&p)[ROW_BLOCKS][2]) {
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (u32 i = 0; i < 4; i++)
      mma(state.output[b][w][i], first[2 * i], first[2 * i + 1], second[2 * i], second[2 * i + 1], p[b][0], p[b][1]);
}

FN void weights(THREAD const Scores& scores, u32 m, THREAD u32 (&p)[ROW_BLOCKS][2]) {
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (u32 h = 0; h < 2; h++)
      p[b][h] = to_b(h2_pack(scores.s[b][m][2 * h], scores.s[b][m][2 * h + 1]));
}

template <int KEY_BITS, int VALUE_BITS>
FN void weigh_page(Place at, THREAD const Scores& scores, THREAD Softmax& state, SHARED meta,
                   BUFFER page, u32 head, u32 group) {
  constexpr bool coded = VALUE_BITS != 16;
  constexpr int units_in_row = coded ? UNITS : ROW_UNITS;
  constexpr u32 row_words = coded ? PADDED_VALUE_DIM * VALUE_BITS / 32 : VALUE_DIM / 2;
  constexpr u32 start = HEADS * KEY_DIM * (PAGE_TOKENS * KEY_BITS / 32) + (coded ? HEADS * KEY_DIM * PAGE_GROUPS : 0);
  u32 first = at.g * LANE_UNITS < units_in_row ? at.g * LANE_UNITS : 0;
  u32 base = start + (head * PAGE_TOKENS + 64 * group + 16 * at.t) * row_words;
  UNROLL for (u32 m = 0; m < 4; m++) {
    Unit units[4][LANE_UNITS];
    UNROLL for (u32 h = 0; h < 4; h++)
      load_units<VALUE_BITS, LANE_UNITS>(page, base + (2 * m + (h >> 1) + 8 * (h & 1)) * row_words, first, units[h]);
    u32 p[ROW_BLOCKS][2];
    weights(scores, m, p);
    UNROLL for (u32 w = 0; w < LANE_UNITS; w++) {
      u32 x[8], y[8];
      unpack<VALUE_BITS, HOT_BFLOAT>(units[0][w], units[1][w], x);
      unpack<VALUE_BITS, HOT_BFLOAT>(units[2][w], units[3][w], y);
      if constexpr (coded) {
        u32 v = (VALUE_GROUP % (8 * LANE_UNITS) == 0 ? first : first + w) * 8 / VALUE_GROUP;
        SHARED scale = meta + KEY_DIM + (v * 32 + 8 * at.t + 2 * m) * 2;
        UNROLL for (u32 j = 0; j < 8; j++) {
          x[j] = h2_fma(x[j], scale[0], scale[1]);
          y[j] = h2_fma(y[j], scale[2], scale[3]);
        }
      }
      weigh_unit(state, w, x, y, p);
    }
  }
}

FN void weigh_hot(Place at, THREAD const Scores& scores, THREAD Softmax& state, BUFFER values, u32 last) {
  u32 first = at.g * LANE_UNITS < ROW_UNITS ? at.g * LANE_UNITS : 0;
  UNROLL for (u32 m = 0; m < 4; m++) {
    u32 p[ROW_BLOCKS][2];
    weights(scores, m, p);
    UNROLL for (u32 w = 0; w < LANE_UNITS; w++) {
      u32 unit = least(first + w, ROW_UNITS - 1);
      Unit units[4];
      UNROLL for (u32 h = 0; h < 4; h++) {
        u32 token = least(16 * at.t + 2 * m + (h >> 1) + 8 * (h & 1), last);
        units[h] = load_unit<16>(values, token * (VALUE_DIM / 2), unit);
      }
      u32 x[8], y[8];
      unpack<16, HOT_BFLOAT>(units[0], units[1], x);
      unpack<16, HOT_BFLOAT>(units[2], units[3], y);
      weigh_unit(state, w, x, y, p);
    }
  }
}

template <int KEY_BITS, int VALUE_BITS>
FN void page_tile(Place at, THREAD Softmax& state, SHARED queries, SHARED meta, BUFFER page,
                  u32 head, u32 group, int valid) {
  Scores scores = {};
  if constexpr (KEY_BITS != 16) {
    simd_barrier();  // the tile before may still be reading its scales
    stage_scales<KEY_BITS, VALUE_BITS>(at, meta, page, head, group);
    simd_barrier();
  }
  score_page<KEY_BITS>(at, scores, queries, meta, page, head, group);
  int limit[ROW_BLOCKS][2];
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++) limit[b][0] = limit[b][1] = valid;
  softmax(at, scores, state, limit, valid >= 64);
  weigh_page<KEY_BITS, VALUE_BITS>(at, scores, state, meta, page, head, group);
}

FN void hot_tile(Place at, THREAD Softmax& state, SHARED queries, BUFFER keys, BUFFER values,
                 int tokens, u32 first_row) {
  Scores scores = {};
  int limit[ROW_BLOCKS][2];
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (u32 r = 0; r < 2; r++) {
      int query = (first_row + 8 * b + 2 * at.t + r) % QUERY_TOKENS;
      limit[b][r] = CAUSAL ? tokens - (QUERY_TOKENS - 1 - query) : tokens;
    }
  u32 last = least(tokens, 64) - 1;
  score_hot(at, scores, queries, keys, last);
  softmax(at, scores, state, limit, tokens - (CAUSAL ? QUERY_TOKENS - 1 : 0) >= 64);
  weigh_hot(at, scores, state, values, last);
}

// Where output element (w, i, e) of lane (g, t) lies during the merge: lanes side by side.
FN u32 merge_index(Place at, u32 b, u32 w, u32 i, u32 e) {
  return ((w * 8 + 2 * i + (e >> 1)) * 8 + at.g) * (8 * ROW_BLOCKS) + 8 * b + 2 * at.t + (e & 1);
}

// Merge the SIMD groups' softmaxes and write the split's partial, or the output if it is alone.
FN void finish(Place at, THREAD Softmax& state, SHARED shared, OUTPUT partial, OUTPUT stats, u64 row0, u32 rows) {
  SHARED peaks = shared + (SHARED_WORDS - STAT_WORDS);
  SHARED totals = peaks + STAT_WORDS / 2;
  constexpr u32 width = 8 * ROW_BLOCKS;
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (u32 r = 0; r < 2; r++) {
      float total = sum_over_rows(state.total[b][r]);
      if (at.g == 0) {
        u32 row = at.warp * width + 8 * b + 2 * at.t + r;
        peaks[row] = as_word(state.peak[b][r]);
        totals[row] = as_word(total);
      }
    }
  barrier();
  float factor[ROW_BLOCKS][2];
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (u32 r = 0; r < 2; r++) {
      float peak = LOWEST;
      for (u32 w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + 8 * b + 2 * at.t + r]));
      factor[b][r] = exp2_fast(state.peak[b][r] - peak);
    }
  for (u32 turn = 0; turn < WARPS; turn++) {
    if (turn == at.warp) {
      UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++)
        UNROLL for (u32 w = 0; w < LANE_UNITS; w++)
          UNROLL for (u32 i = 0; i < 4; i++)
            UNROLL for (u32 e = 0; e < 4; e++) {
              u32 k = merge_index(at, b, w, i, e);
              float before = turn ? as_float(shared[k]) : 0.0f;
              shared[k] = as_word(before + state.output[b][w][i][e] * factor[b][e & 1]);
            }
    }
    barrier();
  }
  u32 thread = at.warp * 32 + at.lane;
  for (u32 i = thread; i < rows * VALUE_DIM; i += 32 * WARPS) {
    u32 row = i / VALUE_DIM, channel = i % VALUE_DIM, unit = channel / 8;
    u32 k = (((unit % LANE_UNITS) * 8 + channel % 8) * 8 + unit / LANE_UNITS) * width + row;
    float x = as_float(shared[k]);
    if (FINAL) {
      float peak = LOWEST, total = 0;
      for (u32 w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + row]));
      for (u32 w = 0; w < WARPS; w++)
        total += as_float(totals[w * width + row]) * exp2_fast(as_float(peaks[w * width + row]) - peak);
      store_number(partial, (row0 + row) * VALUE_DIM + channel, total > 0 ? x / total : 0.0f);
    } else {
      store(partial, (row0 + row) * VALUE_DIM + channel, as_word(x));
    }
  }
  if (!FINAL && thread < rows) {
    float peak = LOWEST, total = 0;
    for (u32 w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + thread]));
    for (u32 w = 0; w < WARPS; w++)
      total += as_float(totals[w * width + thread]) * exp2_fast(as_float(peaks[w * width + thread]) - peak);
    store(stats, 2 * (row0 + thread), as_word(peak));
    store(stats, 2 * (row0 + thread) + 1, as_word(total));
  }
}

#define SOURCE_PARAMETER(index, key_bits, value_bits, page_words) , BUFFER source##index
#define SOURCE_CASE(index, key_bits, value_bits, page_words)                                          \
  case index:                                                                                         \
    page_tile<key_bits, value_bits>(at, state, shared, meta, source##index + u64(slot) * page_words,  \
                                    head, group, valid);                                              \
    break;

// Grid: x splits, y KV heads times row blocks, z sequences of the batch.
// params, 16 words per sequence: pages, hot tokens, pages per split, splits that have pages, hot
// capacity, hot tokens per split, pages per row of the table, splits, first split that has hot
// tokens.
// table, two words per page: slot | source << 28, valid tokens.
FN void attend_pages(u32 lane, u32 warp, u32 split, u32 head_block, u32 sequence, SHARED shared, BUFFER q,
                     BUFFER params, BUFFER table, BUFFER hot_keys, BUFFER hot_values SOURCES(SOURCE_PARAMETER),
                     OUTPUT partial, OUTPUT stats) {
  Place at = {lane, warp, FRAGMENT_ROW(lane), FRAGMENT_PAIR(lane)};
  u32 head = head_block % HEADS, first_row = head_block / HEADS * (8 * ROW_BLOCKS);
  u32 fixed = 16 * sequence;
  u32 pages = load(params, fixed), hot = load(params, fixed + 1), per_split = load(params, fixed + 2);
  u32 page_splits = load(params, fixed + 3), capacity = load(params, fixed + 4);
  u32 hot_per_split = load(params, fixed + 5), stride = load(params, fixed + 6);
  u32 first_hot_split = load(params, fixed + 8);
  u32 head_row = sequence * HEADS + head;
  stage_queries(at, shared, q, first_row, head_row * ROWS);
  barrier();
  Softmax state = {};
  UNROLL for (u32 b = 0; b < ROW_BLOCKS; b++) state.peak[b][0] = state.peak[b][1] = LOWEST;
  SHARED meta = shared + QUERY_WORDS + warp * META_WORDS;
  if (split < page_splits) {
    u32 first = split * per_split, stop = first + per_split < pages ? first + per_split : pages;
    for (u32 tile = first * PAGE_GROUPS + warp; tile < stop * PAGE_GROUPS; tile += WARPS) {
      u32 group = tile % PAGE_GROUPS, entry = 2 * (sequence * stride + tile / PAGE_GROUPS);
      u32 slot = load(table, entry);
      int valid = int(load(table, entry + 1)) - int(64 * group);
      if (valid <= 0) continue;
      u32 source = slot >> 28;
      slot &= 0xfffffff;
      switch (source) { SOURCES(SOURCE_CASE) }
    }
  }
  if (split >= first_hot_split) {
    u32 first = (split - first_hot_split) * hot_per_split, stop = first + hot_per_split < hot ? first + hot_per_split : hot;
    for (u32 token = first + 64 * warp; token < stop; token += 64 * WARPS) {
      u64 row = u64(head_row) * capacity + token;
      hot_tile(at, state, shared, hot_keys + row * (KEY_DIM / 2), hot_values + row * (VALUE_DIM / 2),
               int(hot - token), first_row);
    }
  }
  barrier();  // the merge takes the words of queries and scales
  u32 rows = least(ROWS - first_row, 8 * ROW_BLOCKS);
  u64 row0 = (u64(split) * SEQUENCES * HEADS + head_row) * ROWS + first_row;
  finish(at, state, shared, partial, stats, row0, rows);
}
