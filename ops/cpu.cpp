// Threads, the choice of an instruction set, sampling, and the interface to Python (cpu_library.py) of a CPU's kernels.
//
// A call runs one function in all threads of a pool, which meet at barriers: a fork and join for each op would cost more
// than the ops of a small model. Threads wait for the next call without sleeping for a while, and then sleep.

#include "cpu.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto AWAKE = std::chrono::microseconds(500);  // more than between two steps

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait until ready(), giving way to other processes if it takes long.
template <class F>
void spin(F ready) {
  for (int i = 0; !ready(); i++) i < 4096 ? pause() : std::this_thread::yield();
}

class Memory {  // that grows
 public:
  char* get(size_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

// Threads that stay: the caller and size - 1 others.
class Pool {
 public:
  explicit Pool(int size) : own_(size) {
    for (int i = 1; i < size; i++) std::thread([this, i] { work(i); }).detach();  // for as long as the process
  }

  template <class F>
  void run(size_t shared, size_t own, F f) {
    char* all = shared_.get(shared);
    team_.threads = size(), team_.next = 0;
    auto body = [&](int i) { f(team_, {all, own_[i].get(own)}); };
    if (size() == 1) return body(0);
    std::function<void(int)> job = std::ref(body);
    job_ = &job;
    busy_.store(size() - 1, std::memory_order_relaxed);
    call_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) call_.notify_all();
    body(0);
    spin([&] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  int size() const { return int(own_.size()); }

  void work(int i) {
    for (uint32_t seen = 0;;) {
      auto called = [&] { return call_.load(std::memory_order_acquire) != seen; };
      auto end = Clock::now() + AWAKE;
      for (int n = 1; !called() && (n % 64 || Clock::now() < end); n++) pause();
      while (!called()) {
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        call_.wait(seen, std::memory_order_seq_cst);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen++;
      (*job_)(i);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<Memory> own_;
  Memory shared_;
  Team team_ = {};
  std::function<void(int)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> call_ = 0;
  alignas(64) std::atomic<int> busy_ = 0;
  std::atomic<int> asleep_ = 0;
};

std::mutex mutex;  // one call at a time
std::map<int, Pool*> pools;  // by size; they stay until the process ends, as their threads do
pid_t owner = 0;
const Kernels* kernels = nullptr;

template <class F>
void run(int threads, size_t shared, size_t own, F f) {
  std::lock_guard lock(mutex);
  if (owner != getpid()) pools.clear(), owner = getpid();  // a fork has none of the threads
  Pool*& pool = pools[threads];
  if (!pool) pool = new Pool(threads);
  pool->run(shared, own, f);
}

}  // namespace

void Team::wait() {
  if (threads == 1) {
    next = 0;
    return;
  }
  const uint32_t before = __atomic_load_n(&passed, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    arrived = 0, next = 0;
    __atomic_store_n(&passed, before + 1, __ATOMIC_RELEASE);
  } else
    spin([&] { return __atomic_load_n(&passed, __ATOMIC_ACQUIRE) != before; });
}

// --- instruction sets ------------------------------------------------------------------------------------------------

// Whether this processor, and the system, run the instructions of a set.
API int gptfast_runs(const char* set) {
  auto is = [&](const char* name) { return !std::strcmp(set, name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (is("avx2")) return avx2;
  if (is("avx512")) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (is("avx512vnni")) return vnni;
  if (is("avx512bf16")) return vnni && __builtin_cpu_supports("avx512bf16");
  unsigned a = 0, b, c, d;
  if (is("avxvnni")) return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1 << 4;
#elif defined(__aarch64__) && defined(__linux__)
  if (is("dotprod")) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__aarch64__)
  if (is("dotprod")) return true;  // Apple's all have them
#endif
  return is("generic");
}

// Use these kernels from now on. Returns their lanes.
API int gptfast_use(const Kernels* table) {
  kernels = table;
  return kernels->lanes;
}

// --- what Python calls -----------------------------------------------------------------------------------------------

API void gptfast_linear(const Product* p, int threads) {
  auto scratch = kernels->linear_scratch;
  run(threads, scratch(*p, true), scratch(*p, false), [=](Team& team, Scratch s) { kernels->linear(*p, team, s); });
}

API void gptfast_attention(const Attention* a, int threads) {
  run(threads, 0, kernels->attention_scratch(*a), [=](Team& team, Scratch s) { kernels->attention(*a, team, s); });
}

API void gptfast_step(const Step* step, int threads) {
  auto scratch = kernels->step_scratch;
  run(threads, scratch(*step, true), scratch(*step, false), [=](Team& team, Scratch s) { kernels->step(*step, team, s); });
}

// --- sampling --------------------------------------------------------------------------------------------------------

namespace {

// fp32 in the order of integers, NaN on top; -0 as +0
inline uint32_t rank(float x) {
  uint32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, sizeof x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0xffffffff;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
inline float unrank(uint32_t r) {
  uint32_t bits = r & 0x80000000 ? r & 0x7fffffff : ~r;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The k-th largest logit. The k-th largest maximum of parts is at most that, and leaves few to sort.
float kth_largest(const float* logits, int64_t V, int64_t k) {
  static thread_local std::vector<uint32_t> ranks;
  const int64_t part = std::clamp<int64_t>(V / (2 * k), 1, 64);
  ranks.clear();
  for (int64_t i = 0; i < V; i += part) {
    float top = logits[i];
    for (int64_t j = i; j < std::min(V, i + part); j++) top = logits[j] > top ? logits[j] : top;
    ranks.push_back(rank(top));
  }
  std::nth_element(ranks.begin(), ranks.begin() + k - 1, ranks.end(), std::greater<>());
  const uint32_t limit = ranks[k - 1];
  const float least = unrank(limit);
  ranks.clear();
  for (int64_t i = 0; i < V; i++)
    if (!(logits[i] < least)) ranks.push_back(rank(logits[i]));
  std::nth_element(ranks.begin(), ranks.begin() + k - 1, ranks.end(), std::greater<>());
  return unrank(ranks[k - 1]);
}

// Philox4x32-10's first word (philox.py), as standard Gumbel noise
float gumbel(int64_t seed, int64_t offset, uint32_t row, uint32_t token) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
  uint32_t c0 = token, c1 = row, c2 = uint32_t(offset), c3 = uint32_t(uint64_t(offset) >> 32);
  for (int i = 0; i < 10; i++) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53, p1 = uint64_t(c2) * 0xCD9E8D57;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  const float u = std::min((float(c0) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
  return -std::log(u < 0.01f ? u * (1 + u * (0.5f + u / 3)) : -std::log(1 - u));
}
constexpr float MOST_GUMBEL = 16.7f;  // -log(-log(1 - 2^-24))

int64_t argmax(const float* logits, int64_t V) {  // the first of equals
  int64_t best = 0;
  for (int64_t begin = 0; begin < V; begin += 64) {
    const int64_t end = std::min(V, begin + 64);
    float top = logits[begin];
    for (int64_t i = begin; i < end; i++) top = logits[i] > top ? logits[i] : top;
    if (top > logits[best])
      for (best = begin; logits[best] != top;) best++;
  }
  return best;
}

}  // namespace

// ops/sampling.py's `sample` of logits (B, V); margin: how far below the largest a logit may be for min_p
API void gptfast_sample(const float* logits, int64_t B, int64_t V, float temperature, int64_t top_k, float margin,
                        int64_t* rng, int64_t* out) {
  for (int64_t row = 0; row < B; row++, logits += V) {
    int64_t best = argmax(logits, V);
    if (temperature > 0) {
      float limit = logits[best] + margin;
      if (top_k > 0) limit = std::max(limit, kth_largest(logits, V, std::min(top_k, V)));
      auto score = [&](int64_t i) { return logits[i] / temperature + gumbel(rng[0], rng[1], row, i); };
      float top = score(best);
      float lowest = std::max(limit, (top - MOST_GUMBEL - 0.1f) * temperature);  // what still may be the largest
      for (int64_t i = 0; i < V; i++)
        if (logits[i] >= lowest) {
          const float own = score(i);
          if (own > top || (own == top && i < best)) {
            top = own, best = i;
            lowest = std::max(limit, (top - MOST_GUMBEL - 0.1f) * temperature);
          }
        }
    }
    out[row] = best;
  }
  rng[1]++;
}
