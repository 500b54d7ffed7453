// The tensors of an operator, through torch's stable C interface.
#include <algorithm>
#include <utility>

#include "bucket.h"

namespace fused_adamp {

namespace {

int64_t element_size(int32_t dtype) {
  static const int32_t eight[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_int64()};
  static const int32_t two[] = {aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(), aoti_torch_dtype_int16()};
  if (std::find(std::begin(eight), std::end(eight), dtype) != std::end(eight)) return 8;
  if (std::find(std::begin(two), std::end(two), dtype) != std::end(two)) return 2;
  return dtype == aoti_torch_dtype_float32() ? 4 : 1;  // others are refused by their dtype
}

}  // namespace

TensorRef::TensorRef(AtenTensorHandle handle) : exists(true) {
  int32_t device, layout;
  int64_t *its_sizes, *its_strides;
  void* its_data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &its_sizes));
  sizes = its_sizes;
  numel = 1;
  for (int64_t d = 0; d < dim; ++d) numel *= sizes[d];
  static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
  on_cpu = device == cpu && layout == strided;
  if (!on_cpu) return;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &its_strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &its_data));
  strides = its_strides;
  data = static_cast<char*>(its_data);
  // Offloading tools free a tensor's storage under it.
  int64_t bytes, offset, last = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
  if (numel > 0) on_cpu = (offset + last + 1) * element_size(dtype) <= bytes;
}

bool TensorRef::same_sizes(const TensorRef& other) const {
  return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
}

bool TensorRef::overlaps() const {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t end = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= end) return numel > 0;
    end += (size - 1) * stride;
  }
  return false;
}

TensorList::TensorList(StableIValue argument) {
  const auto list = torch::stable::detail::to<StableListHandle>(argument);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
  TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
}

TensorList::~TensorList() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
}

Shared::Shared(const TensorList& list)
    : needs(reinterpret_cast<uint8_t*>(list[0].data)),
      shares(reinterpret_cast<Shares*>(list[1].data)),
      rows(reinterpret_cast<ViewSums*>(list[2].data)),
      verdicts(reinterpret_cast<Verdict*>(list[3].data)),
      row_projections(reinterpret_cast<double*>(list[4].data)),
      swept(reinterpret_cast<Swept*>(list[5].data)),
      shrink(list[6].data) {}

}  // namespace fused_adamp
