// Memory for the work of one task, kept for the next.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace penguin {

// A buffer of floats at an address that 64 divides; it goes back to where it came from.
class Scratch {
   public:
    // Null when there is no memory.
    explicit Scratch(std::size_t floats) noexcept;
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* get() const { return buffer_.data; }

   private:
    struct Buffer {
        float* data = nullptr;
        std::size_t floats = 0;
    };
    // The buffers of the process that nobody uses: at most as many as tasks ran at one time, and never above kMostKept.
    struct Shelf {
        std::mutex mutex;
        std::vector<Buffer> free;
        Shelf();
        ~Shelf();
    };
    static constexpr std::size_t kMostKept = 64;
    static Shelf& shelf();

    Buffer buffer_;
};

}  // namespace penguin
