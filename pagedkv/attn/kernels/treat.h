// Treated layers: per KV head, their pages hold keys k A and values v B. Hot tokens stay plain.
//
// A split of pages takes queries q Q with Q = A^-T, whose products with the pages' keys are those of
// plain ones, and multiplies what it has summed up by O = B^-1 before other splits meet it. Both are
// products on the matrix unit: columns of the matrix are the left operand, query rows the right one.
// Words of `treatment`: Q of all heads, then O of all heads; float16, row by row.

static_assert(!FINAL, "pages and hot tokens of a treated layer are not in one split");

// 16 columns and 16 rows of a matrix: a left operand in which lane (g, t) holds columns 2g and 2g + 1,
// the operand's rows g and g + 8, and matrix rows in the order of `channel_of`.
template <int DIM> FN void load_operand(Place at, THREAD u32 (&w)[4], BUFFER matrix, int block, int step) {
  UNROLL for (int i = 0; i < 4; i++) {
    int row = 16 * step + 4 * at.t + i, pair = 8 * block + at.g;
    bool there = DIM % 16 == 0 || (row < DIM && 2 * pair < DIM);
    w[i] = there ? load(matrix, row * (DIM / 2) + pair) : 0;
  }
}
// A matrix is asked for before it is needed, if there are registers for that.
template <int DIM> constexpr FN bool early() { return DIM <= 128; }
template <int DIM> FN void load_early(Place at, THREAD Columns<DIM>& columns, BUFFER matrix) {
  UNROLL for (int turn = 0; turn < Columns<DIM>::turns; turn++)
    UNROLL for (int step = 0; step < Columns<DIM>::steps; step++) {
      int block = at.warp + WARPS * turn;
      if (early<DIM>() && block < Columns<DIM>::steps) load_operand<DIM>(at, columns.w[turn][step], matrix, block, step);
    }
}
// Add products of columns with a step's rows, for COUNT right operands; all lanes of a SIMD group come here.
template <int DIM, int COUNT>
FN void multiply(Place at, THREAD float (&sums)[Columns<DIM>::turns][COUNT][4], THREAD const Columns<DIM>& columns,
                 BUFFER matrix, int step, THREAD const u32 (&right)[COUNT][2]) {
  UNROLL for (int turn = 0; turn < Columns<DIM>::turns; turn++) {
    int block = at.warp + WARPS * turn;
    if (Columns<DIM>::steps % WARPS && block >= Columns<DIM>::steps) continue;
    u32 w[4];
    if (early<DIM>()) {
      UNROLL for (int i = 0; i < 4; i++) w[i] = columns.w[turn][step][i];
    } else {
      load_operand<DIM>(at, w, matrix, block, step);
    }
    UNROLL for (int n = 0; n < COUNT; n++)
      mma(sums[turn][n], join_at<0>(w[0], w[1]), join_high(w[0], w[1]), join_at<0>(w[2], w[3]), join_high(w[2], w[3]),
          right[n][0], right[n][1]);
  }
}

// Which lane has row g and pair t of a fragment.
FN int lane_at(int g, int t) {
  return B_ALONG_K ? 4 * g + t : (g & 4) << 2 | (g & 3) << 1 | (t & 2) << 2 | (t & 1);
}
// What float16 cannot hold is clamped: an infinite query would make NaN.
FN u32 finite_pair(float low, float high) {
  low = max_of(-65504.0f, -max_of(-65504.0f, -low));
  high = max_of(-65504.0f, -max_of(-65504.0f, -high));
  return h2_pack(low, high);
}

// Queries of a split of pages: summed in float32, rounded once. All of the threadgroup must come here.
FN void stage_treated(Place at, SHARED queries, BUFFER q, Group group, BUFFER treatment) {
  constexpr int turns = Columns<KEY_DIM>::turns;
  BUFFER matrix = treatment + group.head * (KEY_DIM * KEY_DIM / 2);
  Columns<KEY_DIM> columns;
  load_early(at, columns, matrix);  // on their way with the first tile
  stage_queries(at, queries, q, group);
  barrier();
  float sums[turns][ROW_BLOCKS][4] = {};
  UNROLL for (int step = 0; step < STEPS; step++) {
    u32 plain[ROW_BLOCKS][2];
    UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
      UNROLL for (int part = 0; part < 2; part++)
        plain[b][part] = queries[((step * ROW_BLOCKS + b) * 32 + at.lane) * 2 + part];
    multiply(at, sums, columns, matrix, step, plain);
  }
  // Nobody reads the plain queries any more.
  barrier();
  UNROLL for (int turn = 0; turn < turns; turn++) {
    int block = at.warp + WARPS * turn;
    if (STEPS % WARPS && block >= STEPS) continue;
    UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
      UNROLL for (int h = 0; h < 2; h++) {
        // Channels 2g and 2g + 1 of rows 2t and 2t + 1, to where `stage_queries` has them.
        THREAD const float(&x)[4] = sums[turn][b];
        int lane = B_ALONG_K ? lane_at(2 * at.t + h, at.g >> 1) : lane_at((at.g & ~1) | h, at.t);
        u32 word = B_ALONG_K ? finite_pair(x[h], x[2 + h]) : finite_pair(x[2 * h], x[2 * h + 1]);
        queries[((block * ROW_BLOCKS + b) * 32 + lane) * 2 + (at.g & 1)] = word;
      }
  }
}

// A bound of a row's total, by its bits: made of its SIMD groups' totals without a sum, whose rounding
// may differ from one place of the program to another.
FN u32 exponent_of(SHARED peaks, SHARED totals, int row) {
  constexpr int width = 8 * ROW_BLOCKS;
  float peak = LOWEST, most = 0;
  for (int w = 0; w < WARPS; w++) peak = max_of(peak, as_float(peaks[w * width + row]));
  for (int w = 0; w < WARPS; w++) {
    float keep = exp2_fast((as_float(peaks[w * width + row]) - peak) * SCALE_LOG2E);
    most = max_of(most, as_float(totals[w * width + row]) * keep);
  }
  return as_word(most) & 0x7f800000;
}

FN BUFFER outputs_of(BUFFER treatment, int head) {
  return treatment + (HEADS * (KEY_DIM * KEY_DIM / 2) + head * (VALUE_DIM * VALUE_DIM / 2));
}
FN void load_outputs(Place at, THREAD Columns<VALUE_DIM>& columns, BUFFER treatment, int head) {
  load_early(at, columns, outputs_of(treatment, head));
}

// Store what a split of pages has summed up, in the channels of hot values.
// Sums go through the matrix unit as two float16 each, which together have 22 bits: divided by a power
// of two that is at least twice the row's total, they are no larger than a value.
static_assert(WARPS <= 8, "a total is no more than eight times its largest part");
FN void store_treated(Place at, SHARED shared, OUTPUT partial, u64 row0, int rows,
                      THREAD const Columns<VALUE_DIM>& columns, BUFFER treatment, int head) {
  constexpr int turns = Columns<VALUE_DIM>::turns, width = 8 * ROW_BLOCKS;
  BUFFER matrix = outputs_of(treatment, head);
  SHARED peaks = shared + (SHARED_WORDS - STAT_WORDS);
  SHARED totals = peaks + STAT_WORDS / 2;
  float shrink[ROW_BLOCKS][2];
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int h = 0; h < 2; h++)
      shrink[b][h] = as_float((249u << 23) - exponent_of(peaks, totals, 8 * b + b_column(at, h)));
  float upper[turns][ROW_BLOCKS][4] = {}, lower[turns][ROW_BLOCKS][4] = {};
  UNROLL for (int step = 0; step < Columns<VALUE_DIM>::steps; step++) {
    u32 high[ROW_BLOCKS][2], low[ROW_BLOCKS][2];
    UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
      UNROLL for (int part = 0; part < 2; part++) {
        float x[2];
        UNROLL for (int h = 0; h < 2; h++) {
          int channel = 16 * step + channel_of(b_k(at, h) + 8 * part), unit = channel / 8;
          bool there = VALUE_DIM % 16 == 0 || channel < VALUE_DIM;
          int k = ((unit % LANE_UNITS) * 8 + channel % 8) * 8 + unit / LANE_UNITS;
          x[h] = there ? as_float(shared[k * width + 8 * b + b_column(at, h)]) * shrink[b][h] : 0.0f;
        }
        u32 near = h2_pack(x[0], x[1]);
        high[b][part] = near;
        low[b][part] = h2_pack((x[0] - half_to_float(near & 0xffff)) * 2048.0f,
                               (x[1] - half_to_float(near >> 16)) * 2048.0f);
      }
    multiply(at, upper, columns, matrix, step, high);
    multiply(at, lower, columns, matrix, step, low);
  }
  UNROLL for (int b = 0; b < ROW_BLOCKS; b++)
    UNROLL for (int r = 0; r < 2; r++) {
      int row = 8 * b + 2 * at.t + r;
      if (row >= rows) continue;
      float grow = as_float(exponent_of(peaks, totals, row) + (5u << 23));
      UNROLL for (int turn = 0; turn < turns; turn++) {
        int channel = 16 * (at.warp + WARPS * turn) + 2 * at.g;
        if (channel >= VALUE_DIM) continue;
        float x = multiply_add(lower[turn][b][r], 1.0f / 2048.0f, upper[turn][b][r]);
        float y = multiply_add(lower[turn][b][2 + r], 1.0f / 2048.0f, upper[turn][b][2 + r]);
        store2(partial, (row0 + row) * VALUE_DIM + channel, {as_word(x * grow), as_word(y * grow)});
      }
    }
}
