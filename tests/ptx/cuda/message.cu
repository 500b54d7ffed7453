// Block 0 tells block 1 something behind a flag. Both have to be resident.
//
// FENCES: by fences and relaxed operations; else by a release and an acquire. Planted faults: RELAXED_SEND and
// RELAXED_WAIT order nothing; CTA_SCOPE orders within a block alone; NO_BARRIER sends before all threads have written.
__device__ void send(int* flag) {
#if defined(FENCES)
  __threadfence();
  atomicExch(flag, 1);
#elif defined(RELAXED_SEND)
  asm volatile("st.relaxed.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
#else
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
#endif
}

__device__ bool received(int* flag) {
  int seen;
#if defined(FENCES)
  seen = atomicAdd(flag, 0);
  __threadfence();
#elif defined(RELAXED_WAIT)
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
#elif defined(CTA_SCOPE)
  asm volatile("ld.acquire.cta.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
#else
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
#endif
  return seen;
}

extern "C" __global__ void message(int* data, int* flag, int* out) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 5 * threadIdx.x;
#ifndef NO_BARRIER
    __syncthreads();
#endif
    if (threadIdx.x == 0) send(flag);
  } else {
    if (threadIdx.x == 0)
      while (!received(flag)) {
      }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x ^ 1];
  }
}
