// One planted fault per macro; without any the kernel adds one to n numbers by way of shared memory.
extern "C" __global__ void faults(float* x, const float* fixed, int n) {
  __shared__ float s[64];
  int t = threadIdx.x;
#ifndef UNINITIALISED
  s[t] = x[t];
#else
  if (t) s[t] = x[t];
#endif
#ifndef RACE_IN_SHARED
  __syncthreads();
#endif
  float v = s[t ^ 33] + 1;
#ifdef RACE_BETWEEN_BLOCKS
  x[t] = v + blockIdx.x;
#endif
#ifdef PAST_THE_END
  if (t == 63) x[n] = v;
#endif
#ifdef BEFORE_THE_BEGINNING
  v += x[t - 1];
#endif
#ifdef PAST_SHARED
  s[t + n] = v;
#endif
#ifdef MISALIGNED
  float4 four = *(const float4*)(fixed + 1);
  v += four.x + four.y + four.z + four.w;
#endif
#ifdef READ_ONLY
  if (t == 5) ((float*)fixed)[t] = v;
#endif
#ifdef BARRIER_FOR_SOME
  if (t & 1) __syncthreads();
  v += s[t];
  __syncthreads();
#endif
#ifdef BARRIER_LEFT_OUT
  if (t < 32) __syncthreads();
  else __syncwarp();
  if (t >= 32) while (*(volatile float*)fixed == 0) {}
#endif
#ifdef LANES_LEFT_OUT
  if (t != 3) v += __shfl_sync(~0u, v, 3);
  else asm volatile("exit;");
#endif
#ifdef TRAPS
  if (v > -100) __trap();
#endif
  if (blockIdx.x == 0 && t < n) x[n > 64 ? t : t ^ 33] = v;
}
