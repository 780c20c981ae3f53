// The kernels' vocabulary in CUDA: see docs/kernels.md for what every prelude must define.

typedef unsigned int u32;
typedef unsigned long long u64;

#define CONSTANT constexpr
#define FN __device__ __forceinline__
#define THREAD
#define SHARED u32*
#define BUFFER const u32*
#define OUTPUT u32*
#define UNROLL _Pragma("unroll")

// Matrix fragments, as in PTX's mma.m16n8k16: `g` is the row, `t` the pair of columns.
#define FRAGMENT_ROW(lane) ((lane) >> 2)
#define FRAGMENT_PAIR(lane) ((lane) & 3)
#define B_ALONG_K 1

FN float as_float(u32 x) { return __uint_as_float(x); }
FN u32 as_word(float x) { return __float_as_uint(x); }
FN float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FN float max_of(float a, float b) { return fmaxf(a, b); }

FN u32 load(BUFFER p, int i) { return __ldg(p + i); }
FN u32 load16(BUFFER p, int i) { return __ldg((const unsigned short*)p + i); }
struct Words2 { u32 x, y; };
struct Words4 { u32 x, y, z, w; };
FN Words2 load2(BUFFER p, int i) {
  uint2 v = __ldg((const uint2*)(p + i));
  return {v.x, v.y};
}
FN Words4 load4(BUFFER p, int i) {
  uint4 v = __ldg((const uint4*)(p + i));
  return {v.x, v.y, v.z, v.w};
}
FN void store(OUTPUT p, u64 i, u32 x) { p[i] = x; }
FN void store16(OUTPUT p, u64 i, u32 x) { ((unsigned short*)p)[i] = (unsigned short)x; }

// What other threadgroups of the same launch have stored: read past the caches of this one.
struct Fresh {
  const u32* p;
};
FN Words2 load2(Fresh m, int i) {
  Words2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(m.p + i) : "memory");
  return v;
}
FN Words4 load4(Fresh m, int i) {
  Words4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(m.p + i)
               : "memory");
  return v;
}
// How many threadgroups came here before. What they had stored before their barrier is visible after
// this one's next barrier.
FN u32 arrive(BUFFER turns, u32 i) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(turns + i) : "memory");
  return before;
}

// Tiles go to shared memory while others are worked on.
struct Staged {
  const u32* p;
};
FN u32 load(Staged m, int i) { return m.p[i]; }
FN Words2 load2(Staged m, int i) {
  uint2 v = *(const uint2*)(m.p + i);
  return {v.x, v.y};
}
FN Words4 load4(Staged m, int i) {
  uint4 v = *(const uint4*)(m.p + i);
  return {v.x, v.y, v.z, v.w};
}
template <int WORDS> FN void fetch(SHARED to, int i, BUFFER from, int j) {
  u32 address = (u32)__cvta_generic_to_shared(to + i);
  if constexpr (WORDS == 4)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from + j) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(from + j) : "memory");
}
FN void fetch_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> FN void fetch_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

FN u32 h2_fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// (x & mask) | bits in one instruction, which has room for one of the two constants.
FN u32 and_or(u32 x, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "r"(mask), "r"(bits));
  return d;
}
FN u32 h2_mul(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
FN u32 h2_pack(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
FN float half_to_float(u32 bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }
FN u32 float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

template <int BYTE> FN u32 join_at(u32 a, u32 b) {
  return __byte_perm(a, b, BYTE < 3 ? 0x5410 + 0x1111 * BYTE : 0x7733);
}
FN u32 join_high(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

FN bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
FN void barrier() { __syncthreads(); }
FN void simd_barrier() { __syncwarp(); }
FN float simd_shuffle_xor(float x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FN float max_over_rows(float x) {
  x = fmaxf(x, simd_shuffle_xor(x, 4));
  x = fmaxf(x, simd_shuffle_xor(x, 8));
  return fmaxf(x, simd_shuffle_xor(x, 16));
}
FN float sum_over_rows(float x) {
  x += simd_shuffle_xor(x, 4);
  x += simd_shuffle_xor(x, 8);
  return x + simd_shuffle_xor(x, 16);
}
FN u32 to_b(u32 c) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(c));
  return d;
}
FN void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Words of expand.h and seal.h.
// Through intrinsics: the compiler splits some wide stores that are written as assignments.
FN void store2(OUTPUT p, u64 i, Words2 v) { __stcg((uint2*)(p + i), make_uint2(v.x, v.y)); }
FN void store4(OUTPUT p, u64 i, Words4 v) { __stcg((uint4*)(p + i), make_uint4(v.x, v.y, v.z, v.w)); }
FN void put2(SHARED p, int i, Words2 v) { *(uint2*)(p + i) = make_uint2(v.x, v.y); }
FN void put4(SHARED p, int i, Words4 v) { *(uint4*)(p + i) = make_uint4(v.x, v.y, v.z, v.w); }
FN u32 b2_pack(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
FN float divide(float a, float b) { return __fdiv_rn(a, b); }
FN float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FN float round_even(float x) { return rintf(x); }
