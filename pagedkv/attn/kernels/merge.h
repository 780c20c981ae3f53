// Merging the partial softmaxes of splits by log-sum-exp, in float32.
//
// out = sum_i w_i * partial_i / sum_i w_i * total_i with w_i = 2^(peak_i - max peak); a model's
// attention sink is one more term of the denominator. Splits are merged in groups of MERGE_GROUP,
// then the groups are, always in order: who merges changes no bit.

// Four neighbouring channels of a query row, not yet divided by their total.
struct Quad {
  float sum[4], peak, total;
};

// Partial softmaxes that are loaded together and added in one go; beyond `count` they count nothing.
CONSTANT u32 AT_ONCE = 8;
struct Parts {
  float peak[AT_ONCE], total[AT_ONCE];
  Words4 sum[AT_ONCE];
};

FN void add(THREAD Quad& quad, THREAD const Parts& parts, u32 count) {
  float peak = quad.peak;
  UNROLL for (u32 j = 0; j < AT_ONCE; j++)
    if (j < count) peak = max_of(peak, parts.peak[j]);
  float keep = exp2_fast(quad.peak - peak);
  quad.peak = peak;
  quad.total *= keep;
  UNROLL for (int i = 0; i < 4; i++) quad.sum[i] *= keep;
  UNROLL for (u32 j = 0; j < AT_ONCE; j++) {
    float factor = j < count ? exp2_fast(parts.peak[j] - peak) : 0.0f;
    quad.total = multiply_add(factor, parts.total[j], quad.total);
    quad.sum[0] = multiply_add(factor, as_float(parts.sum[j].x), quad.sum[0]);
    quad.sum[1] = multiply_add(factor, as_float(parts.sum[j].y), quad.sum[1]);
    quad.sum[2] = multiply_add(factor, as_float(parts.sum[j].z), quad.sum[2]);
    quad.sum[3] = multiply_add(factor, as_float(parts.sum[j].w), quad.sum[3]);
  }
}

// Merge `count` partial softmaxes that lie SPLIT_ROWS rows from each other, for N places of a
// thread at once: what it costs is waiting for loads.
CONSTANT u32 SPLIT_ROWS = SEQUENCES * HEADS * ROWS;
struct Spot {
  u32 row, channel;
};
template <int N, class Memory>
FN void merge_partials(Memory partial, Memory stats, u32 count, THREAD const Spot (&spots)[N], THREAD Quad (&quads)[N]) {
  UNROLL for (int n = 0; n < N; n++) quads[n] = {{0, 0, 0, 0}, LOWEST, 0};
  for (u32 first = 0; first < count; first += AT_ONCE) {
    Parts parts[N];
    UNROLL for (int n = 0; n < N; n++)
      UNROLL for (u32 j = 0; j < AT_ONCE; j++) {
        u32 k = (first + j < count ? first + j : first) * SPLIT_ROWS + spots[n].row;
        Words2 stat = load2(stats, 2 * k);
        parts[n].peak[j] = as_float(stat.x);
        parts[n].total[j] = as_float(stat.y);
        parts[n].sum[j] = load4(partial, k * VALUE_DIM + spots[n].channel);
      }
    UNROLL for (int n = 0; n < N; n++) add(quads[n], parts[n], count - first);
  }
}

FN u32 group_count(u32 splits) { return (splits + MERGE_GROUP - 1) / MERGE_GROUP; }
FN u32 group_size(u32 first, u32 splits) { return splits - first < MERGE_GROUP ? splits - first : MERGE_GROUP; }

// An argument that there is only where the model has attention sinks.
#if HAS_SINKS
#define SINKS(...) __VA_ARGS__
#else
#define SINKS(...)
#endif
FN void store_output(OUTPUT out SINKS(, BUFFER sinks), u32 row, u32 channel, THREAD const Quad& quad) {
  float factor = 1.0f, total = quad.total;
#if HAS_SINKS
  {
    u32 head = (row / ROWS % HEADS) * (ROWS / QUERY_TOKENS) + row % ROWS / QUERY_TOKENS;
    float sink = as_float(load(sinks, head)) * 1.4426950408889634f, peak = max_of(quad.peak, sink);
    factor = exp2_fast(quad.peak - peak);
    total = multiply_add(factor, total, exp2_fast(sink - peak + 15.0f));
  }
#endif
  UNROLL for (int i = 0; i < 4; i++)
    store_number(out, u64(row) * VALUE_DIM + channel + i, total == 0 ? 0.0f : quad.sum[i] * factor / total);
}

// A kernel of its own for merging: one threadgroup per query row, one SIMD group per group of splits.
static_assert(MERGE_WARPS == AT_ONCE, "the groups of one round are added in one go");
FN void merge_splits(u32 lane, u32 warp, u32 row, u32, u32, SHARED shared, BUFFER partial, BUFFER stats, BUFFER params
                     SINKS(, BUFFER sinks), OUTPUT out) {
  u32 splits = load(params, 7), me = 32 * warp + lane;
  SHARED peaks = shared + MERGE_WARPS * VALUE_DIM;
  SHARED totals = peaks + MERGE_WARPS;
  Quad all = {{0, 0, 0, 0}, LOWEST, 0};  // one per thread is enough: values have at most 256 channels
  for (u32 first = 0; first < splits; first += MERGE_WARPS * MERGE_GROUP) {
    barrier();
    u32 mine = first + warp * MERGE_GROUP;
    if (mine < splits)
      for (u32 channel = 4 * lane; channel < VALUE_DIM; channel += 128) {
        u64 before = u64(mine) * SPLIT_ROWS;
        Spot spots[1] = {{row, channel}};
        Quad quads[1];
        merge_partials(partial + before * VALUE_DIM, stats + 2 * before, group_size(mine, splits), spots, quads);
        THREAD const Quad& quad = quads[0];
        UNROLL for (int i = 0; i < 4; i++) shared[warp * VALUE_DIM + channel + i] = as_word(quad.sum[i]);
        if (channel == 0) {
          peaks[warp] = as_word(quad.peak);
          totals[warp] = as_word(quad.total);
        }
      }
    barrier();
    if (4 * me < VALUE_DIM) {
      u32 groups = group_count(splits - first);
      Parts parts;
      UNROLL for (u32 w = 0; w < MERGE_WARPS; w++) {
        u32 from = w < groups ? w : 0, k = from * VALUE_DIM + 4 * me;
        parts.peak[w] = as_float(peaks[from]);
        parts.total[w] = as_float(totals[from]);
        parts.sum[w] = {shared[k], shared[k + 1], shared[k + 2], shared[k + 3]};
      }
      add(all, parts, groups);
    }
  }
  if (4 * me < VALUE_DIM) store_output(out SINKS(, sinks), row, 4 * me, all);
}
