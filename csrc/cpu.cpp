// The operators over a bucket.
#include "cpu.h"

#include <stdexcept>
#include <string>

#include "cpu_step.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_adamp {

int64_t layout() { return layout_version; }

std::string instruction_set() { return instructions().name; }

void measure(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  Step step;
  if (step.bind(arguments) >= 0) throw std::runtime_error("fused_adamp::measure: a parameter does not fit its bucket");
  step.measure(arguments.final);
}

void step(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  Step step;
  const int64_t stale = step.bind(arguments);
  if (stale < 0) step.step();
  stack[0] = torch::stable::detail::from(stale);
}

void first_stale(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  stack[0] = torch::stable::detail::from(Step().bind(arguments));
}

void square_norm(StableIValue* stack, uint64_t, uint64_t) {
  const Arguments arguments(stack);
  Step step;
  const bool fits = step.bind(arguments) < 0;
  stack[0] = torch::stable::detail::from(fits ? step.square_norm() : -1.0);
}

void advise_huge_pages(torch::stable::Tensor storage) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(storage.mutable_data_ptr());
  const uintptr_t end = (begin + storage.numel() * storage.element_size()) / page * page;
  const uintptr_t first = (begin + page - 1) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // only advice: may fail
#else
  (void)storage;
#endif
}

}  // namespace fused_adamp
