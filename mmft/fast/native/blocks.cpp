/* Memory of torch's tensors on a CPU from blocks that fit again.

   torch asks for aligned memory, and glibc looks for a gap that is wider by the alignment and more: the gap of a freed
   tensor is too narrow for the next one of its own shape, and stays empty among those that backward waits for. Here
   the whole block is asked for as such, 64 bytes and a place for its beginning wider than the tensor: a gap fits. */

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <limits>

namespace {

constexpr size_t LINE = 64; /* torch's own alignment */
constexpr size_t MORE = LINE + sizeof(void *);

void give(void *at) {
  if (at == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(at);
  std::free(static_cast<void **>(at)[-1]);
}

void *take(size_t bytes) {
  constexpr size_t most = std::numeric_limits<std::ptrdiff_t>::max() - MORE;
  void *whole = bytes > most ? nullptr : std::malloc(bytes + MORE);
  if (whole == nullptr) c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
  TORCH_CHECK(whole != nullptr, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
  auto at = reinterpret_cast<void *>((reinterpret_cast<uintptr_t>(whole) + MORE) / LINE * LINE);
  static_cast<void **>(at)[-1] = whole;
  c10::profiledCPUMemoryReporter().New(at, bytes);
  return at;
}

struct Blocks final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void *at = bytes == 0 ? nullptr : take(bytes);
    return {at, at, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Blocks blocks;
c10::Allocator *before = nullptr;

}  // namespace

/* Tensors made from here on are blocks. 0 where another allocator has the right of way. */
extern "C" int mmft_blocks_in() {
  if (c10::GetCPUAllocator() == &blocks) return 1;
  before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&blocks);
  return c10::GetCPUAllocator() == &blocks;
}

/* As before; tensors that are blocks stay so. */
extern "C" void mmft_blocks_out() {
  if (c10::GetCPUAllocator() == &blocks) c10::SetCPUAllocator(before);
}
