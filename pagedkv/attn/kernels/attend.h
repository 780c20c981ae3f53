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
// Hot tokens come in smaller tiles, of HOT_TILE.

CONSTANT int STEPS = KEY_DIM / 16;
CONSTANT int ROW_BLOCKS = ROWS > 8 ? 2 : 1;
CONSTANT int UNITS = PADDED_VALUE_DIM / 8;
CONSTANT int LANE_UNITS = (UNITS + 7) / 8;  // units of eight channels that one lane holds
// 16-bit pages store no padded channels.
CONSTANT int ROW_UNITS = VALUE_DIM / 8;
// Hot tokens that a SIMD group takes at once: few, for all their loads are under way together.
CONSTANT int HOT_BLOCKS = HOT_TILE / 16;

// Shared memory, in words: queries; per SIMD group the scales of its tile and, where tiles are
// fetched ahead, its codes; statistics. The merge at the end takes the words before the statistics
// for the output of all rows.
CONSTANT int QUERY_WORDS = STEPS * ROW_BLOCKS * 64;
CONSTANT int META_WORDS = KEY_DIM + VALUE_GROUPS * 64;
CONSTANT int GROUP_WORDS = META_WORDS + STAGED_KEY_WORDS + STAGED_VALUE_WORDS;
CONSTANT int STAT_WORDS = WARPS * ROW_BLOCKS * 16;
static_assert(SHARED_WORDS >= QUERY_WORDS + WARPS * GROUP_WORDS + STAT_WORDS, "shared memory");

struct Softmax {
  float output[ROW_BLOCKS][LANE_UNITS][4][4];
  float peak[ROW_BLOCKS][2];   // of the scores, before they are scaled
  float total[ROW_BLOCKS][2];  // this lane's tokens only, until the end
};

struct Scores {
  float s[ROW_BLOCKS][4][4];
};

FN void zero(THREAD Scores& scores) {
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int m = 0; m < 4; m++)
      UNROLL for (int e = 0; e < 4; e++) scores.s[b][m][e] = 0;
}

struct Place {
  int lane, warp, g, t;
};

// The channel that stands at index k of a step of 16: a lane's four channels are neighbours.
FN int channel_of(int k) { return k < 8 ? 4 * (k >> 1) + (k & 1) : 4 * ((k - 8) >> 1) + 2 + (k & 1); }
FN int b_k(Place at, int part) { return B_ALONG_K ? 2 * at.t + part : at.g; }
FN int b_column(Place at, int part) { return B_ALONG_K ? at.g : 2 * at.t + part; }

FN u32 to_half(u32 bits, bool bfloat) {
  return bfloat ? bfloat_pair(bits) & 0xffff : bits;
}

// Scales and biases of a tile on their way to shared memory.
struct Scales {
  u32 key[(KEY_DIM + 63) / 64][4];
  u32 value[VALUE_GROUPS][4];
};

template <int KEY_BITS, int VALUE_BITS>
FN void load_scales(Place at, THREAD Scales& out, BUFFER page, int head, int group) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  UNROLL for (int i = 0; i < (KEY_DIM + 63) / 64; i++) {
    // The last round may have fewer channels; its other lanes load something that is there.
    int spare = KEY_DIM % 64 && i == KEY_DIM / 64 ? KEY_DIM / 2 - 1 - 32 * i : 31;
    int k = (head * KEY_DIM + 2 * least(at.lane, spare)) * PAGE_GROUPS + group;
    UNROLL for (int j = 0; j < 2; j++) {
      out.key[i][j] = load16(page, k + layout::key_scales + (64 * i + j) * PAGE_GROUPS);
      out.key[i][2 + j] = load16(page, k + layout::key_biases + (64 * i + j) * PAGE_GROUPS);
    }
  }
  int token = 64 * group + 16 * (at.lane >> 3) + (at.lane & 7);
  int k = (head * PAGE_TOKENS + token) * VALUE_GROUPS;
  UNROLL for (int v = 0; v < VALUE_GROUPS; v++)
    UNROLL for (int j = 0; j < 2; j++) {
      out.value[v][j] = load16(page, k + layout::value_scales + v + 8 * j * VALUE_GROUPS);
      out.value[v][2 + j] = load16(page, k + layout::value_biases + v + 8 * j * VALUE_GROUPS);
    }
}

// Keys as pairs of channels, bias and scale; values as pairs of tokens 8 apart, scale and bias.
FN void put_scales(Place at, THREAD const Scales& scales, SHARED meta) {
  UNROLL for (int i = 0; i < (KEY_DIM + 63) / 64; i++) {
    int pair = at.lane + 32 * i;
    if (pair < KEY_DIM / 2) {
      meta[2 * pair] = scales.key[i][2] | (scales.key[i][3] << 16);
      meta[2 * pair + 1] = scales.key[i][0] | (scales.key[i][1] << 16);
    }
  }
  UNROLL for (int v = 0; v < VALUE_GROUPS; v++) {
    int k = KEY_DIM + (v * 32 + at.lane) * 2;
    meta[k] = scales.value[v][0] | (scales.value[v][1] << 16);
    meta[k + 1] = scales.value[v][2] | (scales.value[v][3] << 16);
  }
}

// Tiles that were fetched ahead lie in shared memory so that the four lanes of a row read from
// different banks: key rows change places within each four, values have eight words between
// blocks of 16 tokens.
template <int BITS> FN int staged_key_row(int channel) {
  return ((channel & ~3) | ((channel ^ (channel >> 2)) & 3)) * (2 * BITS);
}
template <int BITS> constexpr FN bool fetched() { return FETCH_AHEAD && BITS != 16; }

template <int KEY_BITS, int VALUE_BITS>
FN void fetch_keys(Place at, SHARED stage, BUFFER page, int head, int group) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  if constexpr (fetched<KEY_BITS>()) {
    constexpr int row = 2 * KEY_BITS, chunk = row % 4 ? 2 : 4, chunks = row / chunk;
    BUFFER from = page + (head * KEY_DIM * layout::key_row + group * row);
    if constexpr (32 % chunks == 0 && 32 / chunks % 16 == 0) {
      // Every round is a multiple of 16 channels further, in both places.
      int channel = at.lane / chunks, part = at.lane % chunks * chunk;
      int to = staged_key_row<KEY_BITS>(channel) + part, first = channel * layout::key_row + part;
      UNROLL for (int i = 0; i < KEY_DIM; i += 32 / chunks)
        if (KEY_DIM % (32 / chunks) == 0 || i + channel < KEY_DIM)
          fetch<chunk>(stage, to + i * row, from, first + i * layout::key_row);
    } else {
      UNROLL for (int i = 0; i < KEY_DIM * chunks; i += 32) {
        int channel = (i + at.lane) / chunks, part = (i + at.lane) % chunks * chunk;
        if (KEY_DIM * chunks % 32 == 0 || channel < KEY_DIM)
          fetch<chunk>(stage, staged_key_row<KEY_BITS>(channel) + part, from, channel * layout::key_row + part);
      }
    }
  }
  fetch_commit();
}

template <int KEY_BITS, int VALUE_BITS>
FN void fetch_values(Place at, SHARED stage, BUFFER page, int head, int group) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  if constexpr (fetched<KEY_BITS>()) {
    constexpr int block = 16 * layout::value_row;
    BUFFER from = page + (layout::values + (head * PAGE_TOKENS + 64 * group) * layout::value_row);
    UNROLL for (int i = 0; i < 4 * block; i += 128) {
      int word = 4 * at.lane, blocks = block % 128 == 0 ? i / block : (i + word) / block;
      if (4 * block % 128 == 0 || i + word < 4 * block) fetch<4>(stage, i + word + blocks * 8, from, i + word);
    }
  }
  fetch_commit();
}

// A query operand times the key scales of its channels.
FN u32 scaled(Place at, u32 q, SHARED meta, int step, int part) {
  if (B_ALONG_K) return h2_mul(q, meta[2 * (8 * step + 2 * at.t + part) + 1]);
  int channel = 16 * step + channel_of(at.g + 8 * part);
  u32 scale = (meta[(channel & ~1) + 1] >> (16 * (channel & 1))) & 0xffff;
  return h2_mul(q, scale * 0x10001u);
}

// Scores of a page's tile; `keys` is the page, or the tile where it was fetched ahead.
template <int KEY_BITS, class Memory>
FN void score_page(Place at, THREAD Scores& scores, SHARED queries, SHARED meta, Memory keys, int head, int group) {
  constexpr bool coded = KEY_BITS != 16, ahead = fetched<KEY_BITS>();
  if constexpr (coded) {
    float bias[ROW_BLOCKS][4] = {};
    UNROLL for (int step = 0; step < STEPS; step++) {
      // Biases stand in the operand's upper eight rows; what the lower ones give is not used, so
      // the scales beside the biases can stay where they were loaded.
      int k = 4 * (4 * step + at.t);
      u32 low = meta[k], scale = meta[k + 1], high = meta[k + 2], scale2 = meta[k + 3];
      UNROLL for (int b = 0; b < ROW_BLOCKS; b++) {
        SHARED q = queries + ((step * ROW_BLOCKS + b) * 32 + at.lane) * 2;
        mma(bias[b], low, scale, high, scale2, q[0], q[1]);
      }
    }
    UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
      UNROLL for (int m = 0; m < 4; m++)
        UNROLL for (int e = 0; e < 4; e++) scores.s[b][m][e] = bias[b][e & 1];
  }
  constexpr int row_words = PAGE_TOKENS * KEY_BITS / 32;
  // The rows of a lane's four channels in the first step; a step further is 16 rows further.
  int rows[4];
  UNROLL for (int c = 0; c < 4; c++)
    rows[c] = ahead ? staged_key_row<KEY_BITS>(4 * at.t + c)
                    : (head * KEY_DIM + 4 * at.t + c) * row_words + group * (2 * KEY_BITS);
  constexpr int step_words = 16 * (ahead ? 2 * KEY_BITS : row_words);
  UNROLL for (int step = 0; step < STEPS; step++) {
    Unit units[4];
    UNROLL for (int c = 0; c < 4; c++) units[c] = load_unit<KEY_BITS>(keys, rows[c] + step * step_words, at.g);
    u32 low[8], high[8];
    unpack<KEY_BITS, HOT_BFLOAT>(units[0], units[1], low);
    unpack<KEY_BITS, HOT_BFLOAT>(units[2], units[3], high);
    UNROLL for (int b = 0; b < ROW_BLOCKS; b++) {
      SHARED q = queries + ((step * ROW_BLOCKS + b) * 32 + at.lane) * 2;
      u32 q0 = q[0], q1 = q[1];
      if constexpr (coded) {
        q0 = scaled(at, q0, meta, step, 0);
        q1 = scaled(at, q1, meta, step, 1);
      }
      UNROLL for (int m = 0; m < 4; m++)
        mma(scores.s[b][m], low[2 * m], low[2 * m + 1], high[2 * m], high[2 * m + 1], q0, q1);
    }
  }
}

// Hot keys: rows of 16-bit channels. Rows past the end read the last one; they are masked later.
FN void score_hot(Place at, THREAD Scores& scores, SHARED queries, BUFFER keys, int last) {
  UNROLL for (int m = 0; m < HOT_BLOCKS; m++) {
    int row0 = least(2 * (HOT_BLOCKS * at.g + m), last) * (KEY_DIM / 2);
    int row1 = least(2 * (HOT_BLOCKS * at.g + m) + 1, last) * (KEY_DIM / 2);
    UNROLL for (int step = 0; step < STEPS; step++) {
      Words2 x = load2(keys, row0 + 8 * step + 2 * at.t), y = load2(keys, row1 + 8 * step + 2 * at.t);
      if constexpr (HOT_BFLOAT) {
        x = {bfloat_pair(x.x), bfloat_pair(x.y)};
        y = {bfloat_pair(y.x), bfloat_pair(y.y)};
      }
      UNROLL for (int b = 0; b < ROW_BLOCKS; b++) {
        SHARED q = queries + ((step * ROW_BLOCKS + b) * 32 + at.lane) * 2;
        mma(scores.s[b][m], x.x, y.x, x.y, y.y, q[0], q[1]);
      }
    }
  }
}

// Scores become weights of the running softmax, in place; tokens from `first` up to `limit` are visible.
// Weights carry a factor 2^15: float16 then resolves them down to 2^-39 of the largest.
// Differences of scores come before their scaling: a compiler may fuse a product and a difference,
// and what is left of two equal large products is then no zero.
template <int BLOCKS>
FN void softmax(Place at, THREAD Scores& scores, THREAD Softmax& state, int first,
                THREAD const int (&limit)[ROW_BLOCKS][2], bool all_visible) {
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++) {
    UNROLL for (int r = 0; r < 2; r++) {
      if (!all_visible) {
        UNROLL for (int m = 0; m < BLOCKS; m++)
          UNROLL for (int h = 0; h < 2; h++) {
            int token = 2 * (BLOCKS * at.g + m) + h;
            if (token >= limit[b][r] || (WINDOWED && token < first)) scores.s[b][m][2 * h + r] = 2 * LOWEST;
          }
      }
      float peak = LOWEST;
      UNROLL for (int m = 0; m < BLOCKS; m++)
        UNROLL for (int h = 0; h < 2; h++) peak = max_of(peak, scores.s[b][m][2 * h + r]);
      peak = max_of(state.peak[b][r], max_over_rows(peak));
      float keep = exp2_fast((state.peak[b][r] - peak) * SCALE_LOG2E), sum = 0;
      UNROLL for (int m = 0; m < BLOCKS; m++)
        UNROLL for (int h = 0; h < 2; h++) {
          float p = exp2_fast((scores.s[b][m][2 * h + r] - peak) * SCALE_LOG2E + 15.0f);
          scores.s[b][m][2 * h + r] = p;
          sum += p;
        }
      state.total[b][r] = state.total[b][r] * keep + sum;
      if (any_lane(peak > state.peak[b][r])) {
        UNROLL for (int w = 0; w < LANE_UNITS; w++)
          UNROLL for (int i = 0; i < 4; i++) {
            state.output[b][w][i][r] *= keep;
            state.output[b][w][i][2 + r] *= keep;
          }
      }
      state.peak[b][r] = peak;
    }
  }
}

FN void weigh_unit(THREAD Softmax& state, int w, THREAD const u32 (&first)[8], THREAD const u32 (&second)[8],
                   THREAD const u32 (&p)[ROW_BLOCKS][2]) {
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int i = 0; i < 4; i++)
      mma(state.output[b][w][i], first[2 * i], first[2 * i + 1], second[2 * i], second[2 * i + 1], p[b][0], p[b][1]);
}

FN void weights(THREAD const Scores& scores, int m, THREAD u32 (&p)[ROW_BLOCKS][2]) {
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int h = 0; h < 2; h++)
      p[b][h] = to_b(h2_pack(scores.s[b][m][2 * h], scores.s[b][m][2 * h + 1]));
}

// Values of tokens before `first` and from `valid` on may be NaN: they are zeros here, as their weights are.
template <int KEY_BITS, int VALUE_BITS, class Memory>
FN void weigh_page(Place at, THREAD const Scores& scores, THREAD Softmax& state, SHARED meta, Memory values, int head,
                   int group, int first_token, int valid) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  constexpr bool coded = VALUE_BITS != 16, ahead = fetched<KEY_BITS>();
  constexpr int units_in_row = coded ? UNITS : ROW_UNITS;
  int first = at.g * LANE_UNITS < units_in_row ? at.g * LANE_UNITS : 0;
  int base = ahead ? at.t * (16 * layout::value_row + 8)
                   : layout::values + (head * PAGE_TOKENS + 64 * group + 16 * at.t) * layout::value_row;
  UNROLL for (int m = 0; m < 4; m++) {
    Unit units[4][LANE_UNITS];
    UNROLL for (int h = 0; h < 4; h++)
      load_units<VALUE_BITS, LANE_UNITS>(values, base + (2 * m + (h >> 1) + 8 * (h & 1)) * layout::value_row, first,
                                         units[h]);
    u32 p[ROW_BLOCKS][2];
    weights(scores, m, p);
    UNROLL for (int w = 0; w < LANE_UNITS; w++) {
      u32 x[8], y[8];
      unpack<VALUE_BITS, HOT_BFLOAT>(units[0][w], units[1][w], x);
      unpack<VALUE_BITS, HOT_BFLOAT>(units[2][w], units[3][w], y);
      if constexpr (coded) {
        int v = (VALUE_GROUP % (8 * LANE_UNITS) == 0 ? first : first + w) * 8 / VALUE_GROUP;
        int k = KEY_DIM + (v * 32 + 8 * at.t + 2 * m) * 2;
        u32 scale = meta[k], bias = meta[k + 1], scale2 = meta[k + 2], bias2 = meta[k + 3];
        UNROLL for (int j = 0; j < 8; j++) {
          x[j] = h2_fma(x[j], scale, bias);
          y[j] = h2_fma(y[j], scale2, bias2);
        }
      }
      if (valid < 64 || (WINDOWED && first_token > 0)) {
        u32 seen[2] = {0, 0};
        UNROLL for (int h = 0; h < 4; h++) {
          int token = 16 * at.t + 2 * m + (h >> 1) + 8 * (h & 1);
          if (token < valid && (!WINDOWED || token >= first_token)) seen[h >> 1] |= 0xffffu << (16 * (h & 1));
        }
        UNROLL for (int j = 0; j < 8; j++) {
          x[j] &= seen[0];
          y[j] &= seen[1];
        }
      }
      weigh_unit(state, w, x, y, p);
    }
  }
}

struct HotValues {
  Unit units[HOT_BLOCKS][LANE_UNITS][4];
};

FN void load_hot(Place at, THREAD HotValues& hot, BUFFER values, int last) {
  int first = at.g * LANE_UNITS < ROW_UNITS ? at.g * LANE_UNITS : 0;
  UNROLL for (int m = 0; m < HOT_BLOCKS; m++)
    UNROLL for (int w = 0; w < LANE_UNITS; w++)
      UNROLL for (int h = 0; h < 4; h++) {
        int token = least(2 * (HOT_BLOCKS * (2 * at.t + (h & 1)) + m) + (h >> 1), last);
        hot.units[m][w][h] = load_unit<16>(values, token * (VALUE_DIM / 2), least(first + w, ROW_UNITS - 1));
      }
}

FN void weigh_hot(THREAD const Scores& scores, THREAD Softmax& state, THREAD const HotValues& hot) {
  UNROLL for (int m = 0; m < HOT_BLOCKS; m++) {
    u32 p[ROW_BLOCKS][2];
    weights(scores, m, p);
    UNROLL for (int w = 0; w < LANE_UNITS; w++) {
      THREAD const Unit(&units)[4] = hot.units[m][w];
      u32 x[8], y[8];
      unpack<16, HOT_BFLOAT>(units[0], units[1], x);
      unpack<16, HOT_BFLOAT>(units[2], units[3], y);
      weigh_unit(state, w, x, y, p);
    }
  }
}

// The tiles of a split that one SIMD group takes, and where each is.
struct Tiles {
  int next, stop, first_entry;  // tile numbers; the table's words of the first page
  int visible;                  // the first visible token, from the first page's first
};
struct Tile {
  u32 place;  // slot | precision << 28 | staged << 31
  int group;  // which 64 tokens of the page
  int valid;  // tokens; 0 if there is no tile left
  int first;  // of them, how many are behind the window
};

FN Tile take_tile(THREAD Tiles& tiles, BUFFER table) {
  Tile tile = {0, 0, 0, 0};
  while (tiles.next < tiles.stop && tile.first >= least(tile.valid, 64)) {
    int entry = tiles.first_entry + 2 * (tiles.next / PAGE_GROUPS);
    tile.place = load(table, entry);
    tile.group = tiles.next % PAGE_GROUPS;
    tile.valid = int(load(table, entry + 1)) - 64 * tile.group;
    if (WINDOWED) tile.first = -least(64 * tiles.next - tiles.visible, 0);
    tiles.next += WARPS;
  }
  if (tile.first >= least(tile.valid, 64)) tile.valid = 0;
  return tile;
}

// Grid: x splits, y KV heads times row blocks, z sequences of the batch.
struct Group {
  int split, head, sequence, first_row;
};
FN Group group_at(u32 split, u32 head_block, u32 sequence) {
  return {int(split), int(head_block % HEADS), int(sequence), int(head_block / HEADS) * (8 * ROW_BLOCKS)};
}
// Which row of a split's partial outputs is the threadgroup's first, and how many it has.
FN int row_at(Group group) { return (group.sequence * HEADS + group.head) * ROWS + group.first_row; }
FN int rows_of(Group group) { return least(ROWS - group.first_row, 8 * ROW_BLOCKS); }

// Queries as right operands, ready to use: two words per lane, step and row block.
FN void stage_queries(Place at, SHARED shared, BUFFER q, Group group) {
  int rows_before = (group.sequence * HEADS + group.head) * ROWS;
  for (int i = at.warp; i < STEPS * ROW_BLOCKS * 2; i += WARPS) {
    int part = i & 1, block = (i >> 1) % ROW_BLOCKS, step = (i >> 1) / ROW_BLOCKS;
    u32 word = 0;
    for (int h = 0; h < 2; h++) {
      int row = group.first_row + 8 * block + b_column(at, h);
      int channel = 16 * step + channel_of(b_k(at, h) + 8 * part);
      u32 bits = 0;
      if (row < ROWS) bits = to_half(load16(q, (rows_before + row) * KEY_DIM + channel), QUERY_BFLOAT);
      word |= bits << (16 * h);
    }
    shared[((step * ROW_BLOCKS + block) * 32 + at.lane) * 2 + part] = word;
  }
}

#if TREATED
// Pages of a treated layer have other channels than hot tokens: treat.h.
// What a SIMD group takes of a matrix: blocks of 16 columns in turn, all rows of each.
template <int DIM> struct Columns {
  static CONSTANT int steps = (DIM + 15) / 16, turns = (steps + WARPS - 1) / WARPS;
  u32 w[turns][steps][4];
};
FN void stage_treated(Place at, SHARED queries, BUFFER q, Group group, BUFFER treatment);
FN void load_outputs(Place at, THREAD Columns<VALUE_DIM>& columns, BUFFER treatment, int head);
FN void store_treated(Place at, SHARED shared, OUTPUT partial, u64 row0, int rows,
                      THREAD const Columns<VALUE_DIM>& columns, BUFFER treatment, int head);
#endif

// All tiles of pages. While a tile's keys are scored its values arrive, and while its values are
// weighed the keys of the next tile do, where the target fetches ahead.
FN void page_tiles(Place at, THREAD Softmax& state, SHARED queries, SHARED meta, BUFFER q, Group group, Tiles tiles,
                   BUFFER table SOURCES(SOURCE_PARAMETER)) {
  SHARED stage = meta + META_WORDS;
  SHARED value_stage = stage + STAGED_KEY_WORDS;
  int head = group.head;
  Scores scores;
  Scales scales;
  Tile tile = take_tile(tiles, table);
#define DO(key_bits, value_bits)                                               \
  fetch_keys<key_bits, value_bits>(at, stage, page, head, tile.group);         \
  if (key_bits != 16) load_scales<key_bits, value_bits>(at, scales, page, head, tile.group);
  if (tile.valid) switch ((tile.place >> 28) & 7) { SOURCES(ON_SOURCE) }
#undef DO
  // While the first tile is on its way:
#if TREATED
  stage_treated(at, queries, q, group, treatment);
#else
  stage_queries(at, queries, q, group);
#endif
  barrier();
  while (tile.valid) {
    Tile following = take_tile(tiles, table);
    simd_barrier();  // the tile before may still be read
#define DO(key_bits, value_bits)                                                                          \
  fetch_values<key_bits, value_bits>(at, value_stage, page, head, tile.group);                            \
  if (key_bits != 16) put_scales(at, scales, meta);                                                       \
  fetch_wait<1>();                                                                                        \
  simd_barrier();                                                                                         \
  zero(scores);                                                                                           \
  if constexpr (fetched<key_bits>())                                                                      \
    score_page<key_bits>(at, scores, queries, meta, Staged{stage}, head, tile.group);                     \
  else                                                                                                    \
    score_page<key_bits>(at, scores, queries, meta, page, head, tile.group);
    switch ((tile.place >> 28) & 7) { SOURCES(ON_SOURCE) }
#undef DO
    int limit[ROW_BLOCKS][2];
    UNROLL for (int b = 0; b < ROW_BLOCKS; b++) limit[b][0] = limit[b][1] = tile.valid;
    softmax<4>(at, scores, state, tile.first, limit, tile.valid >= 64 && (!WINDOWED || tile.first == 0));
    Tile current = tile;
    tile = following;
    simd_barrier();
#define DO(key_bits, value_bits)                                               \
  fetch_keys<key_bits, value_bits>(at, stage, page, head, tile.group);         \
  if (key_bits != 16) load_scales<key_bits, value_bits>(at, scales, page, head, tile.group);
    if (tile.valid) {
      switch ((tile.place >> 28) & 7) { SOURCES(ON_SOURCE) }
    } else {
      fetch_commit();
    }
#undef DO
    tile = current;
    fetch_wait<1>();
    simd_barrier();
#define DO(key_bits, value_bits)                                                                           \
  if constexpr (fetched<key_bits>())                                                                       \
    weigh_page<key_bits, value_bits>(at, scores, state, meta, Staged{value_stage}, head, tile.group,       \
                                     tile.first, tile.valid);                                              \
  else                                                                                                     \
    weigh_page<key_bits, value_bits>(at, scores, state, meta, page, head, tile.group, tile.first, tile.valid);
    switch ((tile.place >> 28) & 7) { SOURCES(ON_SOURCE) }
#undef DO
    tile = following;
  }
}

FN void hot_tile(Place at, THREAD Softmax& state, SHARED queries, BUFFER keys, BUFFER values,
                 int tokens, int first_row) {
  Scores scores;
  zero(scores);
  int limit[ROW_BLOCKS][2];
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int r = 0; r < 2; r++) {
      int query = (first_row + 8 * b + 2 * at.t + r) % QUERY_TOKENS;
      limit[b][r] = CAUSAL ? tokens - (QUERY_TOKENS - 1 - query) : tokens;
    }
  int last = least(tokens, HOT_TILE) - 1;
  HotValues hot;
  load_hot(at, hot, values, last);  // on their way while keys are scored
  score_hot(at, scores, queries, keys, last);
  softmax<HOT_BLOCKS>(at, scores, state, 0, limit, tokens - (CAUSAL ? QUERY_TOKENS - 1 : 0) >= HOT_TILE);
  weigh_hot(scores, state, hot);
}

// Where output element (w, i, e) of lane (g, t) lies during the merge: lanes side by side.
FN int merge_index(Place at, int b, int w, int i, int e) {
  return ((w * 8 + 2 * i + (e >> 1)) * 8 + at.g) * (8 * ROW_BLOCKS) + 8 * b + 2 * at.t + (e & 1);
}

// Merge the SIMD groups' softmaxes and write the split's partial, or the output if it is alone.
#if TREATED
FN void finish(Place at, THREAD Softmax& state, SHARED shared, OUTPUT partial, OUTPUT stats, u64 row0, int rows,
               BUFFER treatment, int head, bool treated) {
  Columns<VALUE_DIM> columns;
  if (treated) load_outputs(at, columns, treatment, head);  // on their way while SIMD groups merge
#else
FN void finish(Place at, THREAD Softmax& state, SHARED shared, OUTPUT partial, OUTPUT stats, u64 row0, int rows) {
#endif
  SHARED peaks = shared + (SHARED_WORDS - STAT_WORDS);
  SHARED totals = peaks + STAT_WORDS / 2;
  constexpr int width = 8 * ROW_BLOCKS;
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int r = 0; r < 2; r++) {
      float total = sum_over_rows(state.total[b][r]);
      if (at.g == 0) {
        int row = at.warp * width + 8 * b + 2 * at.t + r;
        peaks[row] = as_word(state.peak[b][r]);
        totals[row] = as_word(total);
      }
    }
  barrier();
  float factor[ROW_BLOCKS][2];
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int r = 0; r < 2; r++) {
      float peak = LOWEST;
      for (int w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + 8 * b + 2 * at.t + r]));
      factor[b][r] = exp2_fast((state.peak[b][r] - peak) * SCALE_LOG2E);
    }
  for (int turn = 0; turn < WARPS; turn++) {
    if (turn == at.warp) {
      UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
        UNROLL for (int w = 0; w < LANE_UNITS; w++)
          UNROLL for (int i = 0; i < 4; i++)
            UNROLL for (int e = 0; e < 4; e++) {
              int k = merge_index(at, b, w, i, e);
              float before = turn ? as_float(shared[k]) : 0.0f;
              shared[k] = as_word(before + state.output[b][w][i][e] * factor[b][e & 1]);
            }
    }
    barrier();
  }
  int me = at.warp * 32 + at.lane;
#if TREATED
  if (treated)
    store_treated(at, shared, partial, row0, rows, columns, treatment, head);
  else
#endif
  for (int i = me; i < rows * VALUE_DIM; i += 32 * WARPS) {
    int row = i / VALUE_DIM, channel = i % VALUE_DIM, unit = channel / 8;
    int k = (((unit % LANE_UNITS) * 8 + channel % 8) * 8 + unit / LANE_UNITS) * width + row;
    float x = as_float(shared[k]);
    if (FINAL) {
      float peak = LOWEST, total = 0;
      for (int w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + row]));
      for (int w = 0; w < WARPS; w++)
        total += as_float(totals[w * width + row]) * exp2_fast((as_float(peaks[w * width + row]) - peak) * SCALE_LOG2E);
      store_number(partial, (row0 + row) * VALUE_DIM + channel, total == 0 ? 0.0f : x / total);
    } else {
      store(partial, (row0 + row) * VALUE_DIM + channel, as_word(x));
    }
  }
  if (!FINAL && me < rows) {
    float peak = LOWEST, total = 0;
    for (int w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + me]));
    for (int w = 0; w < WARPS; w++)
      total += as_float(totals[w * width + me]) * exp2_fast((as_float(peaks[w * width + me]) - peak) * SCALE_LOG2E);
    store(stats, 2 * (row0 + me), as_word(peak * SCALE_LOG2E));
    store(stats, 2 * (row0 + me) + 1, as_word(total));
  }
}

// params, 16 words per sequence: pages, hot tokens, tiles per split, splits that have pages, hot
// capacity, hot tokens per split, pages per row of the table, splits, first split that has hot
// tokens, first split of this launch, first visible token of the pages (where each has PAGE_TOKENS).
// table, two words per page: slot | precision << 28 | staged << 31, valid tokens.
FN void attend_split(u32 lane, u32 warp, Group group, SHARED shared, BUFFER q, BUFFER params, BUFFER table,
                     BUFFER hot_keys, BUFFER hot_values SOURCES(SOURCE_PARAMETER), OUTPUT partial, OUTPUT stats) {
  Place at = {int(lane), int(warp), int(FRAGMENT_ROW(lane)), int(FRAGMENT_PAIR(lane))};
  int head_row = group.sequence * HEADS + group.head, fixed = 16 * group.sequence;
  int number = group.split + load(params, fixed + 9);
  int pages = load(params, fixed), hot = load(params, fixed + 1), per_split = load(params, fixed + 2);
  int page_splits = load(params, fixed + 3), capacity = load(params, fixed + 4);
  int hot_per_split = load(params, fixed + 5), stride = load(params, fixed + 6);
  int first_hot_split = load(params, fixed + 8);
  Softmax state = {};
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++) state.peak[b][0] = state.peak[b][1] = LOWEST;
  SHARED meta = shared + QUERY_WORDS + at.warp * GROUP_WORDS;
  if (number < page_splits) {
    int first = number * per_split;
    Tiles tiles = {first + at.warp, least(first + per_split, pages * PAGE_GROUPS), 2 * group.sequence * stride, 0};
    if (WINDOWED) tiles.visible = load(params, fixed + 10);
    page_tiles(at, state, shared, meta, q, group, tiles, table SOURCES(SOURCE_ARGUMENT));
  } else {
    stage_queries(at, shared, q, group);
    barrier();
  }
  if (number >= first_hot_split) {
    int first = (number - first_hot_split) * hot_per_split, stop = least(first + hot_per_split, hot);
    for (int token = first + HOT_TILE * at.warp; token < stop; token += HOT_TILE * WARPS) {
      u64 row = u64(head_row) * capacity + token;
      hot_tile(at, state, shared, hot_keys + row * (KEY_DIM / 2), hot_values + row * (VALUE_DIM / 2), hot - token,
               group.first_row);
    }
  }
  u64 row0 = u64(group.split) * (SEQUENCES * HEADS * ROWS) + row_at(group);
#if TREATED
  finish(at, state, shared, partial, stats, row0, rows_of(group), treatment, group.head, number < page_splits);
#else
  finish(at, state, shared, partial, stats, row0, rows_of(group));
#endif
}

// The kernel where another one merges.
FN void attend_pages(u32 lane, u32 warp, u32 split, u32 head_block, u32 sequence, SHARED shared, BUFFER q,
                     BUFFER params, BUFFER table, BUFFER hot_keys, BUFFER hot_values SOURCES(SOURCE_PARAMETER),
                     OUTPUT partial, OUTPUT stats) {
  attend_split(lane, warp, group_at(split, head_block, sequence), shared, q, params, table, hot_keys,
               hot_values SOURCES(SOURCE_ARGUMENT), partial, stats);
}
