// Attention in one launch: the threadgroup that is the last of its group of splits merges them, and
// the last of all merges the groups, in the order in which a kernel of its own does (merge.h).
//
// Which one is the last is told by counters: for each KV head and row block, one per group of splits
// and one for the groups. They must be zero at the start. A launch leaves its own counters, `turns`, as
// they are and writes zeros for the next one, so launches need no order but that of their arrays.
//
// Scratch, the same for all launches of a chain of counters: partial outputs of splits, of groups; their peaks and totals, likewise.

CONSTANT u32 TURN_WORDS = MERGE_GROUPS + 1;

// Whether the threadgroup is the last of `count` to come here; it then sees what the others stored.
FN bool is_last(u32 thread, SHARED shared, BUFFER turns, u32 turn, u32 count) {
  barrier();
  if (thread == 0) shared[0] = arrive(turns, turn);
  barrier();
  return shared[0] == count - 1;
}

// Four channels of a row are merged by one thread, which takes up to two such at once.
CONSTANT u32 ROW_QUADS = VALUE_DIM / 4;
CONSTANT int TAKEN = (ROWS < 8 * ROW_BLOCKS ? ROWS : 8 * ROW_BLOCKS) * ROW_QUADS > 32 * WARPS ? 2 : 1;
FN void find_spots(Group group, u32 first, u32 quads, THREAD Spot (&spots)[TAKEN]) {
  UNROLL for (int n = 0; n < TAKEN; n++) {
    u32 i = first + n * 32 * WARPS < quads ? first + n * 32 * WARPS : first;
    spots[n] = {row_at(group) + i / ROW_QUADS, i % ROW_QUADS * 4};
  }
}

FN void attend_and_merge(u32 lane, u32 warp, u32 split, u32 head_block, u32 sequence, SHARED shared, BUFFER q,
                         BUFFER params, BUFFER table, BUFFER hot_keys, BUFFER hot_values SOURCES(SOURCE_PARAMETER)
                         SINKS(, BUFFER sinks), BUFFER turns, OUTPUT scratch, OUTPUT out, OUTPUT next_turns) {
  u32 thread = 32 * warp + lane, splits = load(params, 7), groups = group_count(splits);
  OUTPUT merged = scratch + u64(splits) * SPLIT_ROWS * VALUE_DIM;
  OUTPUT stats = merged + u64(groups) * SPLIT_ROWS * VALUE_DIM;
  OUTPUT merged_stats = stats + 2 * splits * SPLIT_ROWS;
  Group group = group_at(split, head_block, sequence);
  attend_split(lane, warp, group, shared, q, params, table, hot_keys, hot_values SOURCES(SOURCE_ARGUMENT), scratch,
               stats);
  u32 turn = (sequence * (HEADS * ROW_GROUPS) + head_block) * TURN_WORDS;
  if (split == 0)
    for (u32 i = thread; i < TURN_WORDS; i += 32 * WARPS) store(next_turns, turn + i, 0);

  u32 mine = split / MERGE_GROUP, first = mine * MERGE_GROUP, quads = rows_of(group) * ROW_QUADS;
  u32 count = group_size(first, splits);
  if (!is_last(thread, shared, turns, turn + mine, count)) return;
  bool all = groups == 1;
  u64 skip = u64(first) * SPLIT_ROWS;
  for (u32 i = thread; i < quads; i += TAKEN * 32 * WARPS) {
    Spot spots[TAKEN];
    Quad sums[TAKEN];
    find_spots(group, i, quads, spots);
    merge_partials(Fresh{scratch + skip * VALUE_DIM}, Fresh{stats + 2 * skip}, count, spots, sums);
    UNROLL for (int n = 0; n < TAKEN; n++) {
      if (i + n * 32 * WARPS >= quads) continue;
      u32 row = spots[n].row, channel = spots[n].channel;
      THREAD const Quad& quad = sums[n];
      if (all) {
        store_output(out SINKS(, sinks), row, channel, quad);
      } else {
        u64 k = u64(mine) * SPLIT_ROWS + row;
        Words4 sum = {as_word(quad.sum[0]), as_word(quad.sum[1]), as_word(quad.sum[2]), as_word(quad.sum[3])};
        store4(merged, k * VALUE_DIM + channel, sum);
        if (channel == 0) store2(merged_stats, 2 * k, {as_word(quad.peak), as_word(quad.total)});
      }
    }
  }
  if (all || !is_last(thread, shared, turns, turn + MERGE_GROUPS, groups)) return;
  for (u32 i = thread; i < quads; i += TAKEN * 32 * WARPS) {
    Spot spots[TAKEN];
    Quad sums[TAKEN];
    find_spots(group, i, quads, spots);
    merge_partials(Fresh{merged}, Fresh{merged_stats}, groups, spots, sums);
    UNROLL for (int n = 0; n < TAKEN; n++)
      if (i + n * 32 * WARPS < quads) store_output(out SINKS(, sinks), spots[n].row, spots[n].channel, sums[n]);
  }
}
