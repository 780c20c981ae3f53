// Rounding to a few bits, with the arithmetic of `pagedkv.tiers.codec.rounding`.

struct Edges {
  float low, high;
};
struct Affine {
  float scale, bias;
};

// The ends of a group, or what is left of it where one part in TRIM is left out at either end, in
// float16. Every operation rounds once and none can be fused with another.
template <int BITS, int TRIM> FN Affine affine(Edges e) {
  constexpr float steps = (1 << BITS) - 1;
  float width = e.high - e.low, bias = e.low;
  if (TRIM) {
    width = float(TRIM - 2) * width;
    bias = divide(float(TRIM - 1) * e.low + e.high, float(TRIM));
  }
  float scale = max_of(divide(width, steps * float(TRIM ? TRIM : 1)), 5.9604644775390625e-8f);
  u32 half_bias = float_to_half(bias);
  if (half_bias == 0x8000u) half_bias = 0;  // which zero is the smallest is nobody's rule
  // The last code must stand for a number that float16 has: a scale that was rounded up may not.
  u32 half_scale = float_to_half(scale);
  if (half_to_float(half_bias) + steps * half_to_float(half_scale) > 65504.0f) half_scale -= 1;
  return {half_to_float(half_scale), half_to_float(half_bias)};
}

// a / b in correct rounding from 1 / b in correct rounding (Markstein: after the first step the
// quotient is off by less than one unit in the last place, and then the second one makes it right).
FN float quotient(float a, float b, float inverse) {
  float q = a * inverse;
  q = multiply_add(multiply_add(-q, b, a), inverse, q);
  return multiply_add(multiply_add(-q, b, a), inverse, q);
}

// The code of a number, as a whole float.
template <int BITS> FN float rounded(float x, Affine a, float inverse) {
  constexpr float steps = (1 << BITS) - 1;
  x = round_even(quotient(x - a.bias, a.scale, inverse));
  return -max_of(-max_of(x, 0.0f), -steps);
}
