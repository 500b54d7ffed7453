// The sum of n numbers: warps by shuffles, blocks by shared memory, the grid by the block that comes last.
//
// Planted faults: NO_FENCE lets partial sums be read that nobody has published; NO_BARRIER lets warps read `last` and
// `of_warp` before they are written.
extern "C" __global__ void sum(const float* x, float* partial, float* out, unsigned* arrived, int n) {
  __shared__ float of_warp[8];
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int distance = 16; distance; distance /= 2) v += __shfl_down_sync(~0u, v, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
#ifndef NO_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < blockDim.x / 32; ++i) total += of_warp[i];
    partial[blockIdx.x] = total;
#ifndef NO_FENCE
    __threadfence();
#endif
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
#ifndef NO_FENCE
    __threadfence();
#endif
  }
#ifndef NO_BARRIER
  __syncthreads();
#endif
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < gridDim.x; ++i) total += ((volatile float*)partial)[i];
    *out = total;
  }
}
