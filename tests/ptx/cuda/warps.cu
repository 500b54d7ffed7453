// Exchanges between the lanes of a warp, each in one column of `out`; and branches that diverge and converge again.
__device__ int steps(int v) {  // of Collatz, so that lanes leave the loop one by one
  int n = 0;
  while (v > 1) {
    v = v % 2 ? 3 * v + 1 : v / 2;
    ++n;
  }
  return n;
}

extern "C" __global__ void warps(const int* in, int* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  int v = in[i];
  int* row = out + 16 * i;
  row[0] = __shfl_up_sync(~0u, v, 3);
  row[1] = __shfl_down_sync(~0u, v, 5);
  row[2] = __shfl_xor_sync(~0u, v, 6);
  row[3] = __shfl_sync(~0u, v, lane / 2 + 3, 16);
  row[4] = __ballot_sync(~0u, v & 1);
  row[5] = __any_sync(~0u, v == 7) + 2 * __all_sync(~0u, v > -10) + 4 * __all_sync(~0u, v & 1);
  row[6] = __reduce_add_sync(~0u, v);
  row[7] = __reduce_min_sync(~0u, v);
  row[8] = __reduce_max_sync(~0u, (unsigned)v);
  row[9] = __reduce_xor_sync(~0u, (unsigned)v);
  row[10] = __match_any_sync(~0u, v % 4);
  row[11] = steps(v & 63);
  if (lane % 3 == 0) row[12] = __activemask();
  else row[12] = __ballot_sync(0xffffffffu & ~0x49249249u, v & 2);
  __syncwarp();
  int table[6];
  for (int k = 0; k < 6; ++k) table[k] = v * k;
  row[13] = table[(unsigned)v % 6];
  row[14] = blockDim.x * 1000 + warpSize;
  row[15] = n;
}
