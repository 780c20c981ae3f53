// Merge the partial softmaxes of all splits: one threadgroup per query row.
//
// out = sum_i w_i * partial_i / sum_i w_i * total_i with w_i = 2^(peak_i - max peak); a model's
// attention sink is one more term of the denominator. Splits are summed in a fixed order.

CONSTANT int LANE_CHANNELS = (VALUE_DIM + 31) / 32;

FN void merge_splits(u32 lane, u32 warp, u32 row, u32, u32, SHARED shared, BUFFER partial, BUFFER stats, BUFFER params,
                     BUFFER sinks, OUTPUT out) {
  u32 splits = load(params, 7);
  constexpr u32 rows = SEQUENCES * HEADS * ROWS;
  SHARED scratch = shared + MERGE_WARPS * VALUE_DIM;
  float peak = LOWEST;
  for (u32 i = 32 * warp + lane; i < splits; i += 32 * MERGE_WARPS)
    peak = max_of(peak, as_float(load(stats, 2 * (i * rows + row))));
  peak = max_over_simd(peak);
  if (lane == 0) scratch[warp] = as_word(peak);
  barrier();
  for (u32 w = 0; w < MERGE_WARPS; w++) peak = max_of(peak, as_float(scratch[w]));
  float sink = LOWEST;
  if (HAS_SINKS) {
    u32 head = (row / ROWS % HEADS) * (ROWS / QUERY_TOKENS) + row % ROWS / QUERY_TOKENS;
    sink = as_float(load(sinks, head)) * 1.4426950408889634f;
    peak = max_of(peak, sink);
  }
  float sum[LANE_CHANNELS] = {}, total = 0;
  for (u32 i = warp; i < splits; i += MERGE_WARPS) {
    float factor = exp2_fast(as_float(load(stats, 2 * (i * rows + row))) - peak);
    total += factor * as_float(load(stats, 2 * (i * rows + row) + 1));
    UNROLL for (u32 c = 0; c < LANE_CHANNELS; c++) {
      u32 channel = lane + 32 * c;
      if (channel < VALUE_DIM) sum[c] += factor * as_float(load(partial + (u64(i) * rows + row) * VALUE_DIM, channel));
    }
  }
  UNROLL for (u32 c = 0; c < LANE_CHANNELS; c++)
    if (lane + 32 * c < VALUE_DIM) shared[warp * VALUE_DIM + lane + 32 * c] = as_word(sum[c]);
  if (lane == 0) scratch[MERGE_WARPS + warp] = as_word(total);
  barrier();
  total = HAS_SINKS ? exp2_fast(sink - peak + 15.0f) : 0.0f;
  for (u32 w = 0; w < MERGE_WARPS; w++) total += as_float(scratch[MERGE_WARPS + w]);
  for (u32 channel = 32 * warp + lane; channel < VALUE_DIM; channel += 32 * MERGE_WARPS) {
    float x = 0;
    for (u32 w = 0; w < MERGE_WARPS; w++) x += as_float(shared[w * VALUE_DIM + channel]);
    store_number(out, u64(row) * VALUE_DIM + channel, total > 0 ? x / total : 0.0f);
  }
}
