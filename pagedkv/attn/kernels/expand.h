// Prefill: a page table and the hot tokens as dense 16-bit keys and values.
//
// One threadgroup writes 64 tokens of one head. Codes of values lie in the order in which they are
// written. Those of keys lie channel by channel: they go through shared memory, as codes and not
// as numbers, so that a tile is a few KB; a lane then unpacks eight tokens of eight channels, whose
// pairs of neighbouring channels are already what a row of the output holds.

CONSTANT int THREADS = 32 * WARPS;
CONSTANT int KEY_UNITS = KEY_DIM / 8;      // units of eight channels in a row of keys
CONSTANT int VALUE_UNITS = VALUE_DIM / 8;  // padded channels are dropped

struct Tile {
  u32 place;  // slot | precision << 28 | staged << 31
  int head, group, tokens;
  u64 key_row, value_row;  // words of the output before the tile's first row
};

// Two numbers in the output's type. In float16 the multiply-add rounds once, in bfloat16 the
// product and, but for its last bit, the sum are exact in float32.
FN u32 number_pair(u32 codes, u32 scales, u32 biases) {
  if constexpr (OUT_BFLOAT) {
    float low = half_to_float(codes & 0xffff) * half_to_float(scales & 0xffff) + half_to_float(biases & 0xffff);
    float high = half_to_float(codes >> 16) * half_to_float(scales >> 16) + half_to_float(biases >> 16);
    return b2_pack(low, high);
  } else {
    return h2_fma(codes, scales, biases);
  }
}

// Two numbers of the cache's 16-bit type in the output's.
FN u32 converted(u32 pair) {
  if constexpr (HOT_BFLOAT == OUT_BFLOAT)
    return pair;
  else if constexpr (HOT_BFLOAT)
    return bfloat_pair(pair);
  else
    return b2_pack(half_to_float(pair & 0xffff), half_to_float(pair >> 16));
}

FN Words4 converted(Words4 v) { return {converted(v.x), converted(v.y), converted(v.z), converted(v.w)}; }

FN u32 two_halves(BUFFER page, int first, int step) { return load16(page, first) | (load16(page, first + step) << 16); }

// Scales and biases of the tile's keys, as pairs of neighbouring channels.
template <int KEY_BITS, int VALUE_BITS>
FN void stage_key_scales(int me, SHARED scales, BUFFER page, Tile tile) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  if constexpr (layout::coded) {
    UNROLL for (int turn = 0; turn < KEY_DIM / 2; turn += THREADS) {
      int i = turn + me;
      if (KEY_DIM / 2 % THREADS && i >= KEY_DIM / 2) continue;
      int k = (tile.head * KEY_DIM + 2 * i) * PAGE_GROUPS + tile.group;
      put2(scales, 2 * i, {two_halves(page, layout::key_scales + k, PAGE_GROUPS),
                           two_halves(page, layout::key_biases + k, PAGE_GROUPS)});
    }
  }
}

// Key codes of up to CHUNK channels. A few words between each eight channels let the lanes of a
// row, which read eight channels apart, read from different banks.
template <int BITS> FN constexpr int staged_unit() { return 16 * BITS + (BITS == 16 ? 4 : 2); }

template <int BITS> FN void stage_keys(int me, SHARED stage, BUFFER page, Tile tile, int first) {
  constexpr int row = 2 * BITS, page_row = PAGE_TOKENS * BITS / 32, wide = row % 4 ? 2 : 4, parts = row / wide;
  int count = least(CHUNK, KEY_DIM - first) * parts;
  int from = (tile.head * KEY_DIM + first) * page_row + tile.group * row;
  UNROLL for (int turn = 0; turn < CHUNK * parts; turn += THREADS) {
    int i = turn + me;
    if ((CHUNK * parts % THREADS || KEY_DIM % CHUNK) && i >= count) continue;
    int channel = i / parts, part = i % parts * wide;
    int to = channel / 8 * staged_unit<BITS>() + channel % 8 * row + part;
    if constexpr (wide == 4) {
      Words4 v = load4(page, from + channel * page_row + part);
      if constexpr (BITS == 16) {
        put4(stage, to, v);
      } else {
        put2(stage, to, {v.x, v.y});
        put2(stage, to + 2, {v.z, v.w});
      }
    } else {
      put2(stage, to, load2(page, from + channel * page_row + part));
    }
  }
}

template <int BITS>
FN void write_keys(int me, SHARED scales, SHARED stage, OUTPUT keys, Tile tile, int first) {
  int octets = least(CHUNK, KEY_DIM - first) / 8;
  for (int i = me; i < octets * 8; i += THREADS) {
    int octet = i % octets, unit = i / octets;
    u32 pairs[4][8];  // neighbouring channels, tokens
    UNROLL for (int p = 0; p < 4; p++) {
      int row = octet * staged_unit<BITS>() + 2 * p * (2 * BITS);
      Unit a = load_unit<BITS>(Staged{stage}, row, unit), b = load_unit<BITS>(Staged{stage}, row + 2 * BITS, unit);
      unpack<BITS, false>(a, b, pairs[p]);
      if constexpr (BITS != 16) {
        Words2 k = load2(Staged{scales}, first + 8 * octet + 2 * p);
        UNROLL for (int j = 0; j < 8; j++) pairs[p][j] = number_pair(pairs[p][j], k.x, k.y);
      }
    }
    u64 to = tile.key_row + u64(8 * unit) * (KEY_DIM / 2) + (first / 2 + 4 * octet);
    UNROLL for (int j = 0; j < 8; j++) {
      Words4 v = {pairs[0][j], pairs[1][j], pairs[2][j], pairs[3][j]};
      if constexpr (BITS == 16) v = converted(v);
      if (8 * unit + j < tile.tokens) store4(keys, to + j * (KEY_DIM / 2), v);
    }
  }
}

// The same channels of two neighbouring tokens, since unpacking joins two units.
struct ValuePair {
  Unit a, b;
  u32 scale, bias;
};

template <int KEY_BITS, int VALUE_BITS>
FN ValuePair load_values(BUFFER page, Tile tile, int unit, int token) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  int row = tile.head * PAGE_TOKENS + 64 * tile.group + token, at = layout::values + row * layout::value_row;
  int k = row * VALUE_GROUPS + unit / (VALUE_GROUP / 8);
  return {load_unit<VALUE_BITS>(page, at, unit), load_unit<VALUE_BITS>(page, at + layout::value_row, unit),
          two_halves(page, layout::value_scales + k, VALUE_GROUPS),
          two_halves(page, layout::value_biases + k, VALUE_GROUPS)};
}

template <int BITS> FN void store_values(THREAD const ValuePair& pair, OUTPUT values, Tile tile, int unit, int token) {
  u32 x[8];
  unpack<BITS, false>(pair.a, pair.b, x);
  UNROLL for (int j = 0; j < 8; j++) x[j] = number_pair(x[j], pair.scale, pair.bias);
  Words4 first = {join_at<0>(x[0], x[1]), join_at<0>(x[2], x[3]), join_at<0>(x[4], x[5]), join_at<0>(x[6], x[7])};
  Words4 second = {join_high(x[0], x[1]), join_high(x[2], x[3]), join_high(x[4], x[5]), join_high(x[6], x[7])};
  u64 to = tile.value_row + u64(token) * (VALUE_DIM / 2) + 4 * unit;
  if (token < tile.tokens) store4(values, to, first);
  if (token + 1 < tile.tokens) store4(values, to + VALUE_DIM / 2, second);
}

// A lane loads all it needs for a few turns before it waits for any.
template <int KEY_BITS, int VALUE_BITS> FN void write_values(int me, BUFFER page, OUTPUT values, Tile tile) {
  typedef Layout<KEY_BITS, VALUE_BITS> layout;
  constexpr int count = 32 * VALUE_UNITS, turns = least(4, (count + THREADS - 1) / THREADS);
  if constexpr (layout::coded) {
    for (int start = me; start < count; start += turns * THREADS) {
      ValuePair pairs[turns];
      UNROLL for (int turn = 0; turn < turns; turn++) {
        int i = least(start + turn * THREADS, count - 1);
        pairs[turn] = load_values<KEY_BITS, VALUE_BITS>(page, tile, i % VALUE_UNITS, i / VALUE_UNITS * 2);
      }
      UNROLL for (int turn = 0; turn < turns; turn++) {
        int i = start + turn * THREADS;
        if (count % (turns * THREADS) && i >= count) continue;
        store_values<VALUE_BITS>(pairs[turn], values, tile, i % VALUE_UNITS, i / VALUE_UNITS * 2);
      }
    }
  } else {
    BUFFER from = page + (layout::values + (tile.head * PAGE_TOKENS + 64 * tile.group) * layout::value_row);
    for (int i = me; i < tile.tokens * VALUE_UNITS; i += THREADS)
      store4(values, tile.value_row + 4 * i, converted(load4(from, 4 * i)));
  }
}

template <int KEY_BITS, int VALUE_BITS>
FN void expand_tile(int me, SHARED shared, BUFFER page, OUTPUT keys, OUTPUT values, Tile tile) {
  SHARED stage = shared + KEY_DIM;
  stage_key_scales<KEY_BITS, VALUE_BITS>(me, shared, page, tile);
  stage_keys<KEY_BITS>(me, stage, page, tile, 0);
  write_values<KEY_BITS, VALUE_BITS>(me, page, values, tile);
  barrier();
  write_keys<KEY_BITS>(me, shared, stage, keys, tile, 0);
  for (int first = CHUNK; first < KEY_DIM; first += CHUNK) {
    barrier();
    stage_keys<KEY_BITS>(me, stage, page, tile, first);
    barrier();
    write_keys<KEY_BITS>(me, shared, stage, keys, tile, first);
  }
}

// Hot tokens of a tile, UNITS times eight channels each; the first `sinks` of them all stand before
// the pages, the others after.
struct Hot {
  int first, count, sinks, shift;
  u64 head_row;  // of the output
};
template <int UNITS> FN void copy_hot(int me, BUFFER from, OUTPUT to, Hot hot) {
  for (int i = me; i < hot.count * UNITS; i += THREADS) {
    int token = hot.first + i / UNITS;
    u64 row = hot.head_row + (token < hot.sinks ? token : token + hot.shift);
    store4(to, 4 * (row * UNITS + i % UNITS), converted(load4(from, 4 * i)));
  }
}

// Grid: x tiles of 64 tokens (those of the pages first, then those of the hot tokens), y KV heads.
// params: pages, hot tokens, hot tokens before the pages, hot capacity, tokens of the output.
// table, four words per page: slot | precision << 28 | staged << 31, valid tokens, token of the
// output where it starts, 0.
FN void expand_pages(u32 lane, u32 warp, u32 number, u32 head, u32, SHARED shared, BUFFER params, BUFFER table,
                     BUFFER hot_keys, BUFFER hot_values SOURCES(SOURCE_PARAMETER), OUTPUT keys, OUTPUT values) {
  int me = 32 * warp + lane, pages = load(params, 0), hot = load(params, 1), sinks = load(params, 2);
  int capacity = load(params, 3), tokens = load(params, 4);
  int entry = number / PAGE_GROUPS;
  if (entry < pages) {
    int group = number % PAGE_GROUPS, valid = int(load(table, 4 * entry + 1)) - 64 * group;
    if (valid <= 0) return;
    u32 place = load(table, 4 * entry), start = load(table, 4 * entry + 2);
    u64 row = u64(head) * tokens + start + 64 * group;
    Tile tile = {place, int(head), group, least(valid, 64), row * (KEY_DIM / 2), row * (VALUE_DIM / 2)};
#define DO(key_bits, value_bits) expand_tile<key_bits, value_bits>(me, shared, page, keys, values, tile);
    switch ((tile.place >> 28) & 7) { SOURCES(ON_SOURCE) }
#undef DO
  } else {
    int first = 64 * (int(number) - pages * PAGE_GROUPS);
    Hot part = {first, least(64, hot - first), sinks, tokens - hot, u64(head) * tokens};
    u64 row = u64(head) * capacity + first;
    copy_hot<KEY_UNITS>(me, hot_keys + row * (KEY_DIM / 2), keys, part);
    copy_hot<VALUE_UNITS>(me, hot_values + row * (VALUE_DIM / 2), values, part);
  }
}
