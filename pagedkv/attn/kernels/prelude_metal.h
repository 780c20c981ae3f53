// The kernels' vocabulary in the Metal Shading Language: see docs/kernels.md.

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

typedef uint u32;
typedef ulong u64;

#define CONSTANT constant constexpr
#define FN inline
#define THREAD thread
#define SHARED threadgroup u32*
#define BUFFER const device u32*
#define OUTPUT device u32*
#define UNROLL _Pragma("clang loop unroll(full)")

// How an 8x8 simdgroup_matrix lies in the lanes: row `g`, columns 2t and 2t+1. MLX's own matrix
// kernels build on the same fact (steel/gemm/mma.h, BaseMMAFrag::get_coord).
#define FRAGMENT_ROW(lane) ((((lane) >> 4) << 2) | (((lane) >> 1) & 3))
#define FRAGMENT_PAIR(lane) ((((lane) >> 3) & 1) << 1 | ((lane) & 1))
#define B_ALONG_K 0

FN float as_float(u32 x) { return as_type<float>(x); }
FN u32 as_word(float x) { return as_type<u32>(x); }
FN float exp2_fast(float x) { return fast::exp2(x); }
FN float max_of(float a, float b) { return fmax(a, b); }

FN u32 load(BUFFER p, int i) { return p[i]; }
FN u32 load16(BUFFER p, int i) { return ((const device ushort*)p)[i]; }
struct Words2 { u32 x, y; };
struct Words4 { u32 x, y, z, w; };
FN Words2 load2(BUFFER p, int i) {
  uint2 v = *(const device uint2*)(p + i);
  return {v.x, v.y};
}
FN Words4 load4(BUFFER p, int i) {
  uint4 v = *(const device uint4*)(p + i);
  return {v.x, v.y, v.z, v.w};
}
FN void store(OUTPUT p, u64 i, u32 x) { p[i] = x; }
FN void store16(OUTPUT p, u64 i, u32 x) { ((device ushort*)p)[i] = ushort(x); }


// Tiles are read where they are: 32 KB of threadgroup memory would hold too few of them.
struct Staged {
  threadgroup u32* p;
};
FN u32 load(Staged m, int i) { return m.p[i]; }
FN Words2 load2(Staged m, int i) { return {m.p[i], m.p[i + 1]}; }
FN Words4 load4(Staged m, int i) { return {m.p[i], m.p[i + 1], m.p[i + 2], m.p[i + 3]}; }
template <int WORDS> FN void fetch(threadgroup u32*, int, BUFFER, int) {}
FN void fetch_commit() {}
template <int LEFT> FN void fetch_wait() {}

FN u32 h2_fma(u32 a, u32 b, u32 c) {
  return as_type<u32>(fma(as_type<half2>(a), as_type<half2>(b), as_type<half2>(c)));
}
FN u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
FN u32 h2_mul(u32 a, u32 b) { return as_type<u32>(as_type<half2>(a) * as_type<half2>(b)); }
FN u32 h2_pack(float low, float high) { return as_type<u32>(half2(half(low), half(high))); }
FN float half_to_float(u32 bits) { return float(as_type<half>(ushort(bits))); }
FN u32 float_to_half(float x) { return u32(as_type<ushort>(half(x))); }

template <int BYTE> FN u32 join_at(u32 a, u32 b) {
  return ((a >> (8 * BYTE)) & 0xffff) | ((b >> (8 * BYTE)) << 16);
}
FN u32 join_high(u32 a, u32 b) { return (a >> 16) | (b & 0xffff0000u); }

FN bool any_lane(bool x) { return simd_any(x); }
FN void barrier() { threadgroup_barrier(mem_flags::mem_threadgroup); }
FN void simd_barrier() { simdgroup_barrier(mem_flags::mem_threadgroup); }
FN float max_over_rows(float x) {
  x = fmax(x, simd_shuffle_xor(x, 2));
  x = fmax(x, simd_shuffle_xor(x, 4));
  return fmax(x, simd_shuffle_xor(x, 16));
}
FN float sum_over_rows(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}
FN u32 to_b(u32 c) { return c; }
FN void mma8(thread float* c, u32 a, u32 b) {
  simdgroup_matrix<half, 8, 8> left, right;
  simdgroup_matrix<float, 8, 8> sum;
  reinterpret_cast<thread half2&>(left.thread_elements()) = as_type<half2>(a);
  reinterpret_cast<thread half2&>(right.thread_elements()) = as_type<half2>(b);
  reinterpret_cast<thread float2&>(sum.thread_elements()) = float2(c[0], c[1]);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  float2 out = reinterpret_cast<thread float2&>(sum.thread_elements());
  c[0] = out.x;
  c[1] = out.y;
}
FN void mma(thread float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma8(c, a0, b0);
  mma8(c, a2, b1);
  mma8(c + 2, a1, b0);
  mma8(c + 2, a3, b1);
}

// Words of expand.h and seal.h.
FN void store2(OUTPUT p, u64 i, Words2 v) { *(device uint2*)(p + i) = uint2(v.x, v.y); }
FN void store4(OUTPUT p, u64 i, Words4 v) { *(device uint4*)(p + i) = uint4(v.x, v.y, v.z, v.w); }
FN void put2(SHARED p, int i, Words2 v) { *(threadgroup uint2*)(p + i) = uint2(v.x, v.y); }
FN void put4(SHARED p, int i, Words4 v) { *(threadgroup uint4*)(p + i) = uint4(v.x, v.y, v.z, v.w); }
FN u32 b2_one(float x) {
  u32 bits = as_word(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // round to nearest even
}
FN u32 b2_pack(float low, float high) { return b2_one(low) | (b2_one(high) << 16); }
// MLX compiles kernels in safe math mode, where this is rounded correctly.
FN float divide(float a, float b) { return a / b; }
FN float multiply_add(float a, float b, float c) { return fma(a, b, c); }
FN float round_even(float x) { return rint(x); }
