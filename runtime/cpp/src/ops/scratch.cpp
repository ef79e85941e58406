#include "scratch.h"

#include <cstdlib>
#include <new>

namespace penguin {
namespace {
constexpr std::size_t kAlignment = 64;
}

Scratch::Shelf::Shelf() { free.reserve(kMostKept); }

Scratch::Shelf::~Shelf() {
    for (const Buffer& buffer : free) std::free(buffer.data);
}

Scratch::Shelf& Scratch::shelf() {
    static Shelf instance;
    return instance;
}

Scratch::Scratch(std::size_t floats) noexcept {
    Shelf& shelf = Scratch::shelf();
    {
        const std::lock_guard lock(shelf.mutex);
        if (!shelf.free.empty()) {
            buffer_ = shelf.free.back();
            shelf.free.pop_back();
        }
    }
    if (buffer_.floats >= floats) return;
    std::free(buffer_.data);
    const std::size_t bytes = (floats * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    buffer_.data = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
    buffer_.floats = buffer_.data ? floats : 0;
}

Scratch::~Scratch() {
    if (!buffer_.data) return;
    Shelf& shelf = Scratch::shelf();
    const std::lock_guard lock(shelf.mutex);
    if (shelf.free.size() < kMostKept) {
        shelf.free.push_back(buffer_);
    } else {
        std::free(buffer_.data);
    }
}

}  // namespace penguin
