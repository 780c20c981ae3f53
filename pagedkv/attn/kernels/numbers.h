// Numbers in and out of the attention kernels.

CONSTANT float LOWEST = -1e30f;  // stands in for minus infinity: no NaN where all is masked

// One output number in the queries' type, 16 bit.
FN void store_number(OUTPUT out, u64 i, float x) {
  if constexpr (QUERY_BFLOAT) {
    u32 bits = as_word(x);
    store16(out, i, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest even
  } else {
    store16(out, i, float_to_half(x));
  }
}
