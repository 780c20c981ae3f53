// The kernels' vocabulary on the host: every lane is a fiber, every memory access is checked.
//
// A threadgroup runs as cooperative fibers on one thread. Barriers, shuffles and matrix products
// are meeting points: a fiber that arrives gives way until all that must meet have arrived. Fibers
// run in a random order, so that code which relies on an order it was not promised gets caught.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#include <ucontext.h>
#include <sys/mman.h>

typedef uint32_t u32;
typedef uint64_t u64;

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FIBER_SANITIZER 1
#else
#define FIBER_SANITIZER 0
#endif

namespace emulator {

constexpr size_t STACK_BYTES = 512 * 1024;

struct Fetch {
  const u32* source;
  u32* target;
  u32 words;
  u64 group;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  bool done = false;
  u64 waits_for = 0;  // generation that must pass before it can go on
  bool in_simd = false;
  std::deque<Fetch> fetches;
  u64 fetch_group = 0;
};

struct Meeting {
  u32 size = 0, arrived = 0;
  u64 generation = 0;
};

struct Failure {
  std::string what;
};

struct Group {
  std::vector<Fiber> fibers;
  std::vector<Meeting> simds;
  Meeting all;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  void* scheduler_fake = nullptr;
  u32 current = 0;
  std::vector<u32> mailbox;  // [generation parity][lane][8 words]
  std::string failure;
  void (*body)(u32) = nullptr;
  std::mt19937 order;
};

inline Group* group = nullptr;

inline void fail(const std::string& what) {
  if (group && group->failure.empty()) group->failure = what;
  throw Failure{what};
}

inline void give_way() {
  Group& g = *group;
  Fiber& me = g.fibers[g.current];
#if FIBER_SANITIZER
  __sanitizer_start_switch_fiber(&me.fake_stack, g.scheduler_stack, g.scheduler_size);
#endif
  swapcontext(&me.context, &g.scheduler);
#if FIBER_SANITIZER
  __sanitizer_finish_switch_fiber(me.fake_stack, &g.scheduler_stack, &g.scheduler_size);
#endif
  if (!g.failure.empty()) throw Failure{g.failure};
}

inline void meet(Meeting& meeting, bool simd) {
  Fiber& me = group->fibers[group->current];
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.generation++;
    return;
  }
  me.waits_for = meeting.generation + 1;
  me.in_simd = simd;
  give_way();
}

inline void trampoline() {
  Group& g = *group;
  u32 me = g.current;
#if FIBER_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &g.scheduler_stack, &g.scheduler_size);
#endif
  try {
    g.body(me);
  } catch (const Failure&) {
  }
  g.fibers[me].done = true;
#if FIBER_SANITIZER
  __sanitizer_start_switch_fiber(nullptr, g.scheduler_stack, g.scheduler_size);
#endif
  setcontext(&g.scheduler);
}

// Run one threadgroup of `threads` lanes; returns what went wrong, or nothing.
inline std::string run_group(u32 threads, void (*body)(u32), u32 seed) {
  static std::vector<char*> stacks;
  while (stacks.size() < threads) {
    void* p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return "no memory for fibers";
    stacks.push_back((char*)p);
  }
  Group g;
  group = &g;
  g.body = body;
  g.order.seed(seed);
  g.fibers.resize(threads);
  g.simds.resize((threads + 31) / 32);
  g.all.size = threads;
  for (u32 i = 0; i < g.simds.size(); i++) g.simds[i].size = std::min(32u, threads - 32 * i);
  g.mailbox.assign(2 * threads * 8, 0xdeadbeef);
  for (u32 i = 0; i < threads; i++) {
    Fiber& f = g.fibers[i];
    f.stack = stacks[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = STACK_BYTES;
    f.context.uc_link = nullptr;
    makecontext(&f.context, trampoline, 0);
  }
  std::vector<u32> turn(threads);
  for (u32 i = 0; i < threads; i++) turn[i] = i;
  for (;;) {
    std::shuffle(turn.begin(), turn.end(), g.order);
    u32 left = 0, ran = 0;
    for (u32 i : turn) {
      Fiber& f = g.fibers[i];
      if (f.done) continue;
      left++;
      u64 now = f.in_simd ? g.simds[i / 32].generation : g.all.generation;
      if (f.waits_for > now && g.failure.empty()) continue;
      f.waits_for = 0;
      ran++;
      g.current = i;
#if FIBER_SANITIZER
      void* fake = nullptr;
      __sanitizer_start_switch_fiber(&fake, f.stack, STACK_BYTES);
#endif
      swapcontext(&g.scheduler, &f.context);
#if FIBER_SANITIZER
      __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }
    if (!left) break;
    if (!ran) g.failure = "lanes wait for each other: a barrier or SIMD operation that not all of them reach";
  }
  group = nullptr;
  return g.failure;
}

inline u32 thread() { return group->current; }

// Every lane of the SIMD group leaves `count` words; afterwards all can be read.
inline const u32* exchange(const u32* mine, u32 count) {
  Group& g = *group;
  u32 me = g.current;
  Meeting& simd = g.simds[me / 32];
  u32* box = &g.mailbox[(simd.generation & 1) * g.fibers.size() * 8];
  std::copy(mine, mine + count, box + me * 8);
  meet(simd, true);
  return box + me / 32 * 32 * 8;
}

// Words of device memory that know where they end.
struct Buffer {
  u32* data = nullptr;
  int64_t words = 0;  // from `data` on
  int64_t before = 0;  // words that lie before `data`
  const char* name = "";
  u32* at(int64_t i, u32 count, u32 align) const {
    if (i + count > words || i < -before)
      fail(std::string(name) + ": word " + std::to_string(i) + " of " + std::to_string(words));
    u32* p = data + i;
    if (reinterpret_cast<uintptr_t>(p) % (4 * align)) fail(std::string(name) + ": a load of " + std::to_string(align) + " words is not aligned");
    return p;
  }
  Buffer operator+(int64_t offset) const {
    return {data + offset, words - offset, before + offset, name};
  }
};

// Shared memory of a threadgroup, checked the same way; poisoned before each run.
struct SharedWords {
  u32* data;
  int64_t words, before;
  struct Word {
    u32* p;
    operator u32() const { return *p; }
    Word& operator=(u32 x) { *p = x; return *this; }
    Word& operator=(const Word& other) { *p = *other.p; return *this; }
  };
  Word operator[](int64_t k) const {
    if (k >= words || k < -before) fail("shared memory: word " + std::to_string(k) + " of " + std::to_string(words));
    return {data + k};
  }
  SharedWords operator+(int64_t offset) const { return {data + offset, words - offset, before + offset}; }
};

}  // namespace emulator

typedef emulator::Buffer BUFFER;
typedef emulator::Buffer OUTPUT;
#define SHARED emulator::SharedWords

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


// Fetching ahead: a copy happens when it is asked for or when it is waited for, by chance. What
// is read too early or overwritten too early shows as a wrong result.
struct Staged {
  emulator::SharedWords p;
};
FN const u32* staged(const Staged& m, int i, u32 count) {
  m.p[i + count - 1];
  if (reinterpret_cast<uintptr_t>(&*m.p[i].p) % (4 * count)) emulator::fail("shared memory: a load is not aligned");
  return m.p[i].p;
}
FN u32 load(const Staged& m, int i) { return *staged(m, i, 1); }
FN Words2 load2(const Staged& m, int i) { const u32* v = staged(m, i, 2); return {v[0], v[1]}; }
FN Words4 load4(const Staged& m, int i) { const u32* v = staged(m, i, 4); return {v[0], v[1], v[2], v[3]}; }
template <int WORDS> FN void fetch(emulator::SharedWords to, int i, const BUFFER& from, int j) {
  const u32* source = from.at(j, WORDS, WORDS);
  u32* target = const_cast<u32*>(staged(Staged{to}, i, WORDS));
  emulator::Fiber& me = emulator::group->fibers[emulator::thread()];
  if (emulator::group->order() & 1)
    std::copy(source, source + WORDS, target);
  else
    me.fetches.push_back({source, target, WORDS, me.fetch_group});
}
FN void fetch_commit() { emulator::group->fibers[emulator::thread()].fetch_group++; }
template <int LEFT> FN void fetch_wait() {
  emulator::Fiber& me = emulator::group->fibers[emulator::thread()];
  while (!me.fetches.empty() && me.fetches.front().group + LEFT < me.fetch_group) {
    const auto& f = me.fetches.front();
    std::copy(f.source, f.source + f.words, f.target);
    me.fetches.pop_front();
  }
}

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
FN void barrier() { emulator::meet(emulator::group->all, false); }
FN void simd_barrier() { emulator::meet(emulator::group->simds[emulator::thread() / 32], true); }
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
FN void put2(emulator::SharedWords p, int i, Words2 v) {
  staged(Staged{p}, i, 2);
  p[i] = v.x; p[i + 1] = v.y;
}
FN void put4(emulator::SharedWords p, int i, Words4 v) {
  staged(Staged{p}, i, 4);
  p[i] = v.x; p[i + 1] = v.y; p[i + 2] = v.z; p[i + 3] = v.w;
}
FN u32 b2_one(float x) {
  u32 bits = as_word(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
FN u32 b2_pack(float low, float high) { return b2_one(low) | (b2_one(high) << 16); }
FN float divide(float a, float b) { return a / b; }
FN float round_even(float x) { return std::nearbyint(x); }
