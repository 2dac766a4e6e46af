// A device named "pretend": memory of the CPU that torch takes for an accelerator's (its PrivateUse1 backend). Every
// operation is computed by the CPU's kernels, but a CPU tensor of one dimension or more beside a pretended one is
// refused, as CUDA refuses it. So code can be shown to keep its tensors together where there is no accelerator.

#include <torch/extension.h>

#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using namespace at;

const Device kPretend(DeviceType::PrivateUse1, 0);

void release(void* memory) { free(memory); }

struct Memory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = malloc(bytes ? bytes : 1);
    return {memory, memory, &release, kPretend};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

// One device, one stream, nothing asynchronous.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return kPretend; }
  Device getDevice() const override { return kPretend; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<CPUGeneratorImpl>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* held = storage.unsafeGetStorageImpl();
    auto fresh = memory.allocate(bytes);
    if (held->data() && held->nbytes()) memcpy(fresh.mutable_get(), held->data(), std::min(bytes, held->nbytes()));
    held->set_data_ptr_noswap(std::move(fresh));
    held->set_nbytes(bytes);
  }
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(IntArrayRef size, std::optional<ScalarType> type, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> type, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(type));
}

// A CPU tensor over the same memory.
Tensor on_cpu(const Tensor& x) {
  if (x.device().type() == DeviceType::CPU) return x;
  auto options = TensorOptions().dtype(x.dtype()).device(kCPU);
  auto* start = const_cast<void*>(x.storage().data());
  return at::from_blob(start, x.sizes(), x.strides(), x.storage_offset(), [](void*) {}, options, Device(kCPU));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  AutoDispatchBelowADInplaceOrView below;
  if (to.numel()) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Scalar item(const Tensor& x) { return at::_local_scalar_dense(on_cpu(x)); }

Tensor as_strided(const Tensor& x, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(x, size, stride, offset);
}

Tensor view(const Tensor& x, IntArrayRef size) { return at::cpu::view(x, size); }

Tensor reshape_alias(const Tensor& x, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::_reshape_alias(x, size, stride);
}

const Tensor& resized(const Tensor& x, IntArrayRef size, std::optional<MemoryFormat>) {
  size_t bytes = (c10::multiply_integers(size) + x.storage_offset()) * x.itemsize();
  if (bytes > x.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(x.storage(), bytes);
  x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return x;
}

Tensor& set_storage(Tensor& x, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  x.unsafeGetTensorImpl()->set_storage_offset(offset);
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return x;
}

// Indices of x[...] may lie on the CPU, and copies go from one device to the other; everything else stays together.
bool may_mix(const std::string& name) {
  for (auto* known : {"aten::index.", "aten::index_put", "aten::_index_put", "aten::_unsafe_index"})
    if ((name + ".").rfind(known, 0) == 0) return true;
  return name.find("copy") != std::string::npos && name.rfind("aten::index", 0) != 0;
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool here = false, there = false;
  auto see = [&](const Tensor& x) {
    if (!x.defined()) return;
    if (x.device().type() != DeviceType::CPU) there = true;
    else if (x.dim() > 0) here = true;
  };
  auto given = torch::jit::last(*stack, op.schema().arguments().size());
  for (const auto& value : given) {
    if (value.isTensor()) see(value.toTensor());
    else if (value.isList())
      for (const IValue& one : value.toListRef())
        if (one.isTensor()) see(one.toTensor());
  }
  const auto& name = op.operator_name().name;
  bool fine = may_mix(name) && !(given[0].isTensor() && given[0].toTensor().device().type() == DeviceType::CPU);
  TORCH_CHECK(!(here && there) || fine, "tensors of two devices in ", name);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resized);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", [] {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
}
