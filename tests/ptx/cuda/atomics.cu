// One cell for each operation, in global memory and then in shared memory, by all threads of the grid or of a block.
template <class T>
__device__ void update(int* ints, T* numbers, unsigned* wrapping, int t) {
  atomicAdd(&ints[0], t);
  atomicMin(&ints[1], 100 - t);
  atomicMax(&ints[2], t - 100);
  atomicAnd(&ints[3], ~(1 << t % 32));
  atomicOr(&ints[4], 1 << t % 32);
  atomicXor(&ints[5], t);
  atomicInc(&wrapping[0], 9);
  atomicDec(&wrapping[1], 9);
  atomicAdd(&numbers[0], T(t) / 4);
  for (int old = 0, seen; (seen = atomicCAS(&ints[6], old, old + 2)) != old; old = seen) {
  }
  atomicExch(&ints[7], 5);
}

extern "C" __global__ void atomics(int* ints, float* floats, double* doubles, unsigned* wrapping, int* of_block) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  update(ints, floats, wrapping, t);
  atomicAdd(doubles, t / 8.0);
  __shared__ int inside[10];
  __shared__ float number;
  if (threadIdx.x < 10) inside[threadIdx.x] = 0;
  if (threadIdx.x == 0) number = 0;
  __syncthreads();
  update(inside, &number, (unsigned*)inside + 8, threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 10) of_block[11 * blockIdx.x + threadIdx.x] = inside[threadIdx.x];
  if (threadIdx.x == 0) of_block[11 * blockIdx.x + 10] = int(4 * number);
}
