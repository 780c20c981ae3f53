// A threadgroup on the host: every lane is a fiber, every memory access is checked.
//
// The fibers of a threadgroup take turns on one thread. Barriers, shuffles and matrix products are
// meeting points: a fiber that arrives gives way until all that must meet have arrived. Fibers run
// in a random order, so that code which relies on an order it was not promised gets caught.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

typedef uint32_t u32;
typedef uint64_t u64;

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FIBER_SANITIZER 1
#else
#define FIBER_SANITIZER 0
#endif

namespace emulator {

// Small: AddressSanitizer clears its notes about the whole stack at every switch.
constexpr size_t STACK_BYTES = 128 * 1024, GUARD_BYTES = 64 * 1024;
constexpr u32 POISON = 0x7fc07e7e;  // NaN as a float and as each of two 16-bit floats

struct Failure {
  std::string what;
};

// A copy on its way to shared memory.
struct Fetch {
  const u32* source;
  int64_t target;  // word of shared memory
  u32 words;
  u64 group;
  bool done;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  bool done = false;
  u64 waits_for = 0;  // generation that must pass before it can go on
  bool in_simd = false;
  u32 simd_fences = 0, group_fences = 0;  // barriers passed; a group's barrier counts as both
  std::deque<Fetch> fetches;
  u64 fetch_group = 0;
};

struct Meeting {
  u32 size = 0, arrived = 0;
  u64 generation = 0;
};

// Who touched a word of shared memory, and how many barriers that lane had passed.
struct Access {
  u32 lane = ~0u, simd_fences = 0, group_fences = 0;
  bool none() const { return lane == ~0u; }
};

// These readers are enough: of lanes that are equally far from the next writer the last one counts.
struct WordHistory {
  Access write, read;
  Access other_lane, other_simd;  // the last reads by another lane, another SIMD group than `read`
  bool in_flight = false;  // a fetch was issued and not waited for
};

struct Group {
  std::vector<Fiber> fibers;
  std::vector<Meeting> simds;
  Meeting all;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  u32 current = 0;
  std::vector<u32> mailbox;  // [generation parity][lane][8 words]
  std::string failure;
  void (*body)(u32) = nullptr;
  std::mt19937 order;
  u32* shared = nullptr;
  std::vector<WordHistory> history;
};

inline Group* group = nullptr;

[[noreturn]] inline void fail(const std::string& what) {
  if (group->failure.empty()) group->failure = what;
  throw Failure{what};
}

inline Fiber& me() { return group->fibers[group->current]; }

inline void give_way() {
  Group& g = *group;
  Fiber& fiber = me();
#if FIBER_SANITIZER
  __sanitizer_start_switch_fiber(&fiber.fake_stack, g.scheduler_stack, g.scheduler_size);
#endif
  swapcontext(&fiber.context, &g.scheduler);
#if FIBER_SANITIZER
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &g.scheduler_stack, &g.scheduler_size);
#endif
  if (!g.failure.empty()) throw Failure{g.failure};
}

inline void meet(Meeting& meeting, bool simd) {
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.generation++;
    return;
  }
  Fiber& fiber = me();
  fiber.waits_for = meeting.generation + 1;
  fiber.in_simd = simd;
  give_way();
}

inline void trampoline() {
  Group& g = *group;
  u32 lane = g.current;
#if FIBER_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &g.scheduler_stack, &g.scheduler_size);
#endif
  try {
    g.body(lane);
    if (!g.fibers[lane].fetches.empty()) fail("a lane ends while its fetches are under way");
  } catch (const Failure&) {
  }
  g.fibers[lane].done = true;
#if FIBER_SANITIZER
  __sanitizer_start_switch_fiber(nullptr, g.scheduler_stack, g.scheduler_size);
#endif
  setcontext(&g.scheduler);
}

// Run one threadgroup of `threads` lanes; returns what went wrong, or nothing.
inline std::string run_group(u32 threads, void (*body)(u32), u32 seed, u32* shared, size_t shared_words) {
  static std::vector<char*> stacks;
  while (stacks.size() < threads) {
    // Below each stack lies a page that nobody may touch.
    void* p = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, GUARD_BYTES, PROT_NONE)) return "no memory for fibers";
    stacks.push_back((char*)p + GUARD_BYTES);
  }
  Group g;
  group = &g;
  g.body = body;
  g.order.seed(seed);
  g.fibers.resize(threads);
  g.simds.resize((threads + 31) / 32);
  g.all.size = threads;
  for (u32 i = 0; i < g.simds.size(); i++) g.simds[i].size = std::min(32u, threads - 32 * i);
  g.mailbox.assign(2 * threads * 8, POISON);
  g.shared = shared;
  g.history.resize(shared_words);
  std::fill(shared, shared + shared_words, POISON);
  for (u32 i = 0; i < threads; i++) {
    Fiber& f = g.fibers[i];
    f.stack = stacks[i];
#if FIBER_SANITIZER
    __asan_unpoison_memory_region(f.stack, STACK_BYTES);  // frames that never returned
#endif
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

// Every lane of the SIMD group leaves `count` words; afterwards all can be read, eight per lane.
inline const u32* exchange(const u32* mine, u32 count) {
  Group& g = *group;
  u32 lane = g.current;
  Meeting& simd = g.simds[lane / 32];
  u32* box = &g.mailbox[(simd.generation & 1) * g.fibers.size() * 8];
  std::copy(mine, mine + count, box + lane * 8);
  meet(simd, true);
  return box + lane / 32 * 32 * 8;
}

inline void simd_barrier() {
  meet(group->simds[thread() / 32], true);
  me().simd_fences++;
}

inline void group_barrier() {
  meet(group->all, false);
  me().simd_fences++;
  me().group_fences++;
}

// Whether a barrier that both lanes passed lies between an access and this lane's next one.
// Shuffles and matrix products are no barriers: hardware orders no memory by them.
inline bool ordered(const Access& before) {
  u32 lane = thread();
  if (before.none() || before.lane == lane) return true;
  return before.lane / 32 == lane / 32 ? me().simd_fences > before.simd_fences
                                       : me().group_fences > before.group_fences;
}

[[noreturn]] inline void fail_at(int64_t word, const char* what, const Access& before = {}) {
  std::string where = "shared memory, word " + std::to_string(word) + ": " + what;
  if (!before.none()) where += " (lane " + std::to_string(before.lane) + ", then lane " + std::to_string(thread()) + ")";
  fail(where);
}

inline Access this_access() { return {thread(), me().simd_fences, me().group_fences}; }

inline void note_read(int64_t word) {
  WordHistory& h = group->history[word];
  if (h.in_flight) fail_at(word, "read while it is fetched");
  if (h.write.none()) fail_at(word, "read before anything was written");
  if (!ordered(h.write)) fail_at(word, "no barrier between a write and a read", h.write);
  u32 lane = thread();
  if (h.read.lane / 32 != lane / 32) h.other_simd = h.read;
  if (h.read.lane != lane) h.other_lane = h.read;
  h.read = this_access();
}

inline void note_write(int64_t word) {
  WordHistory& h = group->history[word];
  if (h.in_flight) fail_at(word, "written while it is fetched");
  if (!ordered(h.write)) fail_at(word, "no barrier between two writes", h.write);
  for (const Access& read : {h.read, h.other_lane, h.other_simd})
    if (!ordered(read)) fail_at(word, "no barrier between a read and a write", read);
  h.write = this_access();
  h.read = h.other_lane = h.other_simd = Access{};
}

// A copy happens when it is asked for or when it is waited for, by chance.
inline void start_fetch(const u32* source, int64_t target, u32 words) {
  Fiber& fiber = me();
  for (u32 i = 0; i < words; i++) {
    note_write(target + i);
    group->history[target + i].in_flight = true;
  }
  bool now = group->order() & 1;
  if (now) std::copy(source, source + words, group->shared + target);
  fiber.fetches.push_back({source, target, words, fiber.fetch_group, now});
}

// Wait until at most `left` of the lane's newest groups of fetches are under way.
inline void wait_fetches(u64 left) {
  Fiber& fiber = me();
  while (!fiber.fetches.empty() && fiber.fetches.front().group + left < fiber.fetch_group) {
    const Fetch& f = fiber.fetches.front();
    if (!f.done) std::copy(f.source, f.source + f.words, group->shared + f.target);
    for (u32 i = 0; i < f.words; i++) {
      group->history[f.target + i].in_flight = false;
      group->history[f.target + i].write = this_access();
    }
    fiber.fetches.pop_front();
  }
}

// Words of device memory that know where they end.
struct Buffer {
  u32* data = nullptr;
  int64_t words = 0;   // from `data` on
  int64_t before = 0;  // words that lie before `data`
  const char* name = "";
  u32* at(int64_t i, u32 count, u32 align) const {
    if (i + count > words || i < -before)
      fail(std::string(name) + ": word " + std::to_string(i) + " of " + std::to_string(words));
    u32* p = data + i;
    if (reinterpret_cast<uintptr_t>(p) % (4 * align))
      fail(std::string(name) + ": a load of " + std::to_string(align) + " words is not aligned");
    return p;
  }
  Buffer operator+(int64_t offset) const { return {data + offset, words - offset, before + offset, name}; }
};

// Shared memory of a threadgroup, checked the same way and for races.
struct SharedWords {
  u32* data;
  int64_t words, before;
  struct Word {
    u32* p;
    operator u32() const {
      note_read(p - group->shared);
      return *p;
    }
    Word& operator=(u32 x) {
      note_write(p - group->shared);
      *p = x;
      return *this;
    }
    Word& operator=(const Word& other) { return *this = u32(other); }
  };
  Word operator[](int64_t k) const { return {check(k, 1)}; }
  u32* check(int64_t k, u32 count) const {
    if (k + count > words || k < -before)
      fail("shared memory: word " + std::to_string(k) + " of " + std::to_string(words));
    if (reinterpret_cast<uintptr_t>(data + k) % (4 * count)) fail("shared memory: an access is not aligned");
    return data + k;
  }
  // `count` words that this lane reads together.
  const u32* read(int64_t k, u32 count) const {
    const u32* p = check(k, count);
    for (u32 i = 0; i < count; i++) note_read(p + i - group->shared);
    return p;
  }
  u32* write(int64_t k, u32 count) const {
    u32* p = check(k, count);
    for (u32 i = 0; i < count; i++) note_write(p + i - group->shared);
    return p;
  }
  SharedWords operator+(int64_t offset) const { return {data + offset, words - offset, before + offset}; }
};

}  // namespace emulator
