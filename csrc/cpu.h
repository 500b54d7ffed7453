// The operators of cpu.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

namespace fused_adamp {

// The operators over a bucket, with their arguments on the stack: registration.cpp has their schemas.
void measure(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
void step(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
void first_stale(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);
void square_norm(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

// Asks the system to back the storage with huge pages: fewer address translations on the way to memory.
void advise_huge_pages(torch::stable::Tensor storage);

// bucket.h, layout_version.
int64_t layout();

// The instruction set that steps run with: "baseline", "avx2" or "avx512".
std::string instruction_set();

}  // namespace fused_adamp
