// The kernels' vocabulary on the host, for tests: on fibers and checked memory (fibers.h, beside
// the emulator). Lanes hold matrix fragments as on CUDA.

#include "fibers.h"

typedef emulator::Buffer BUFFER;
typedef emulator::Buffer OUTPUT;
#define SHARED emulator::SharedWords

#define CONSTANT constexpr
#define FN static inline
#define THREAD
#define UNROLL

#define FRAGMENT_ROW(lane) ((lane) >> 2)
#define FRAGMENT_PAIR(lane) ((lane) & 3)
#define B_ALONG_K 1

typedef _Float16 half;

FN float as_float(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
FN u32 as_word(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
FN float exp2_fast(float x) { return std::exp2(x); }
FN float max_of(float a, float b) { return a > b ? a : b; }
FN half to_float16(u32 bits) { uint16_t b = uint16_t(bits); half h; std::memcpy(&h, &b, 2); return h; }
FN u32 from_float16(half h) { uint16_t b; std::memcpy(&b, &h, 2); return b; }

struct Words2 { u32 x, y; };
struct Words4 { u32 x, y, z, w; };
FN u32 load(const BUFFER& p, int i) { return *p.at(i, 1, 1); }
FN u32 load16(const BUFFER& p, int i) { return (*p.at(i / 2, 1, 1) >> (16 * (i & 1))) & 0xffff; }
FN Words2 load2(const BUFFER& p, int i) { const u32* v = p.at(i, 2, 2); return {v[0], v[1]}; }
FN Words4 load4(const BUFFER& p, int i) { const u32* v = p.at(i, 4, 4); return {v[0], v[1], v[2], v[3]}; }
FN void store(const OUTPUT& p, u64 i, u32 x) { *p.at(i, 1, 1) = x; }
FN void store16(const OUTPUT& p, u64 i, u32 x) {
  u32* word = p.at(i / 2, 1, 1);
  u32 shift = 16 * (i & 1);
  *word = (*word & ~(0xffffu << shift)) | ((x & 0xffff) << shift);
}

// Threadgroups run one after the other, in any order.
typedef BUFFER Fresh;
FN u32 arrive(const BUFFER& turns, u32 i) { return (*turns.at(i, 1, 1))++; }

// Fetching ahead: what is read too early or overwritten too early is noticed.
struct Staged {
  emulator::SharedWords p;
};
FN u32 load(const Staged& m, int i) { return *m.p.read(i, 1); }
FN Words2 load2(const Staged& m, int i) { const u32* v = m.p.read(i, 2); return {v[0], v[1]}; }
FN Words4 load4(const Staged& m, int i) { const u32* v = m.p.read(i, 4); return {v[0], v[1], v[2], v[3]}; }
template <int WORDS> FN void fetch(emulator::SharedWords to, int i, const BUFFER& from, int j) {
  const u32* source = from.at(j, WORDS, WORDS);
  emulator::start_fetch(source, to.check(i, WORDS) - emulator::group->shared, WORDS);
}
FN void fetch_commit() { emulator::me().fetch_group++; }
template <int LEFT> FN void fetch_wait() { emulator::wait_fetches(LEFT); }

FN u32 each_half(u32 a, u32 b, u32 c, double (*f)(double, double, double)) {
  u32 out = 0;
  for (int i = 0; i < 2; i++)
    out |= from_float16(half(f(to_float16(a >> (16 * i)), to_float16(b >> (16 * i)), to_float16(c >> (16 * i))))) << (16 * i);
  return out;
}
FN u32 h2_fma(u32 a, u32 b, u32 c) { return each_half(a, b, c, [](double x, double y, double z) { return x * y + z; }); }
FN u32 and_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
FN u32 h2_mul(u32 a, u32 b) { return each_half(a, b, 0, [](double x, double y, double) { return x * y; }); }
FN u32 h2_pack(float low, float high) { return from_float16(half(low)) | (from_float16(half(high)) << 16); }
FN float half_to_float(u32 bits) { return float(to_float16(bits)); }
FN u32 float_to_half(float x) { return from_float16(half(x)); }

template <int BYTE> FN u32 join_at(u32 a, u32 b) { return ((a >> (8 * BYTE)) & 0xffff) | ((b >> (8 * BYTE)) << 16); }
FN u32 join_high(u32 a, u32 b) { return (a >> 16) | (b & 0xffff0000u); }

FN bool any_lane(bool x) {
  u32 mine = x;
  const u32* all = emulator::exchange(&mine, 1);
  for (u32 i = 0; i < 32; i++)
    if (all[8 * i]) return true;
  return false;
}
FN void barrier() { emulator::group_barrier(); }
FN void simd_barrier() { emulator::simd_barrier(); }
FN float simd_shuffle_xor(float x, u32 mask) {
  u32 bits = as_word(x);
  return as_float(emulator::exchange(&bits, 1)[8 * ((emulator::thread() & 31) ^ mask)]);
}
FN float max_over_rows(float x) {
  x = max_of(x, simd_shuffle_xor(x, 4));
  x = max_of(x, simd_shuffle_xor(x, 8));
  return max_of(x, simd_shuffle_xor(x, 16));
}
FN float sum_over_rows(float x) {
  x += simd_shuffle_xor(x, 4);
  x += simd_shuffle_xor(x, 8);
  return x + simd_shuffle_xor(x, 16);
}
FN u32 to_b(u32 c) {
  const u32* all = emulator::exchange(&c, 1);
  u32 lane = emulator::thread() & 31, g = lane >> 2, t = lane & 3, out = 0;
  for (u32 h = 0; h < 2; h++) out |= ((all[8 * (4 * (2 * t + h) + g / 2)] >> (16 * (g & 1))) & 0xffff) << (16 * h);
  return out;
}
FN void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  const u32* all = emulator::exchange(mine, 6);
  u32 lane = emulator::thread() & 31, g = lane >> 2, t = lane & 3;
  for (u32 e = 0; e < 4; e++) {
    u32 row = e >> 1, column = 2 * t + (e & 1);
    float sum = c[e];
    for (u32 k = 0; k < 16; k++) {
      u32 pair = (k & 7) >> 1, high = k >> 3, shift = 16 * (k & 1);
      u32 a = all[8 * (4 * g + pair) + 2 * high + row] >> shift;
      u32 b = all[8 * (4 * column + pair) + 4 + high] >> shift;
      sum += float(to_float16(a)) * float(to_float16(b));
    }
    c[e] = sum;
  }
}

// Words of expand.h and seal.h.
FN void store2(const OUTPUT& p, u64 i, Words2 v) {
  u32* to = p.at(i, 2, 2);
  to[0] = v.x; to[1] = v.y;
}
FN void store4(const OUTPUT& p, u64 i, Words4 v) {
  u32* to = p.at(i, 4, 4);
  to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}
FN void put2(const emulator::SharedWords& p, int i, Words2 v) {
  u32* to = p.write(i, 2);
  to[0] = v.x, to[1] = v.y;
}
FN void put4(const emulator::SharedWords& p, int i, Words4 v) {
  u32* to = p.write(i, 4);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
FN u32 b2_one(float x) {
  u32 bits = as_word(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
FN u32 b2_pack(float low, float high) { return b2_one(low) | (b2_one(high) << 16); }
FN float divide(float a, float b) { return a / b; }
FN float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
FN float round_even(float x) { return std::nearbyint(x); }
