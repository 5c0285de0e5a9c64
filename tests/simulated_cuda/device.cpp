// A CUDA device that is simulated: its tensors lie in the CPU's memory and refuse to meet the CPU's.
//
// For builds of PyTorch without CUDA.  The kernels are the CPU's: every operator falls back to them, by way of copies, after a
// check that its tensors are on one device.  What a real device does besides (streams, TF32, other orders of summation, speed) is
// not here: this finds tensors made or left in the wrong place, generators of the wrong device, and code that asks for CUDA in a way
// that PyTorch does not have.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>

namespace {

using at::Tensor;
using c10::IValue;
using Sizes = c10::SymIntArrayRef;

const c10::Device CUDA(c10::DeviceType::CUDA, 0);
const c10::DispatchKeySet KEY(c10::DispatchKey::CUDA);

// ------------------------------------------------------------------ one device, one stream, memory, generators

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  c10::Device getDevice() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return CUDA; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* memory = nullptr;
    if (n) {
      TORCH_CHECK(posix_memalign(&memory, 64, n) == 0, "CUDA out of memory");
      std::memset(memory, 0xCD, n);  // what is read before it is written shows
    }
    return {memory, memory, &std::free, CUDA};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};

Memory memory;

struct Generator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  Generator() : c10::GeneratorImpl(CUDA, KEY) {}
  static c10::DeviceType device_type() { return c10::DeviceType::CUDA; }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->inner = inner.clone();
    return copy;
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);

// ------------------------------------------------------------------ making, viewing and copying tensors

// The same memory, as the CPU's.
Tensor on_cpu(const Tensor& x) {
  if (!x.is_cuda()) return x;
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), x.storage().nbytes(), c10::DataPtr(x.storage().mutable_data(), c10::Device(c10::kCPU)), nullptr,
      false);
  return at::empty({0}, x.options().device(c10::kCPU)).set_(storage, x.storage_offset(), x.sizes(), x.strides());
}

void check_ordinal(std::optional<at::Device> device) {
  TORCH_CHECK(!device || device->index() <= 0, "CUDA error: invalid device ordinal");
}

Tensor empty(
    Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  check_ordinal(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEY, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>) {
  check_ordinal(device);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, KEY, c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& x, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& x, Sizes size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& x, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize_(const Tensor& x, Sizes size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage_and_shape(Tensor& x, at::Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  return at::native::set_storage_cpu_(
      x, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(Tensor& x, at::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / x.dtype().itemsize());
  return at::native::set_storage_cpu_(x, std::move(storage), 0, {n}, {});
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& x) { return at::_local_scalar_dense(on_cpu(x)); }

// No fused attention: the plain formula.
int64_t fused_sdp_choice(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

// ------------------------------------------------------------------ everything else

// Every tensor on the device, but for numbers and, where it is indexed, indices.
at::Generator checked(const std::string& name, const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const bool indexing = INDEXING.count(name);
  const auto check = [&](const Tensor& x, bool indexed) {
    if (!x.defined() || x.is_cuda() || (x.dim() == 0 && !indexed)) return;
    TORCH_CHECK(!indexed, "indices should be either on cpu or on the same device as the indexed tensor (cpu)");
    TORCH_CHECK(
        indexing, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ", x.device(), "! (", name,
        ")");
  };
  const auto n = op.schema().arguments().size();
  auto generator = default_generator();
  for (size_t i = 0; i < n; i++) {
    IValue& argument = (*stack)[stack->size() - n + i];
    if (argument.isTensor()) check(argument.toTensor(), indexing && i == 0);
    if (argument.isTensorList())
      for (const Tensor& x : argument.toTensorVector()) check(x, false);
    if (argument.isOptionalTensorList())
      for (const auto& x : argument.toOptionalTensorVector())
        if (x) check(*x, false);
    if (argument.isGenerator()) {
      generator = argument.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      argument = IValue();  // the CPU's kernel takes the CPU's own, lent below
    }
  }
  return generator;
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto generator = checked(op.schema().operator_name().name, op, stack);
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return at::native::cpu_fallback(op, stack, true);
  auto cpu = at::detail::getDefaultCPUGenerator();
  const auto before = cpu.get_state();
  cpu.set_state(Tensor(generator.unsafeGetGeneratorImpl()->get_state()));
  try {
    at::native::cpu_fallback(op, stack, true);
  } catch (...) {
    cpu.set_state(before);
    throw;
  }
  generator.unsafeGetGeneratorImpl()->set_state(*cpu.get_state().unsafeGetTensorImpl());
  cpu.set_state(before);
}

// For what the CPU has no bfloat16 kernel of.
void run_in_float(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool half = false;
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    if ((*stack)[i].isTensor() && (*stack)[i].toTensor().scalar_type() == at::kBFloat16) {
      half = true;
      (*stack)[i] = (*stack)[i].toTensor().to(at::kFloat);
    }
  }
  run(op, stack);
  if (half) stack->back() = stack->back().toTensor().to(at::kBFloat16);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_and_shape);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("_fused_sdp_choice", fused_sdp_choice);
  // PyTorch takes this one apart for CUDA's own kernels
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run>());
  m.impl("avg_pool3d", torch::CppFunction::makeFromBoxedFunction<&run_in_float>());
  m.impl("avg_pool3d_backward", torch::CppFunction::makeFromBoxedFunction<&run_in_float>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::DeviceType::CUDA, &memory, 1);
  m.def("default_generator", &default_generator);
}
