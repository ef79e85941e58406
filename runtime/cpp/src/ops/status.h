// The result of a call that can fail: nothing, or a sentence that says what came, what was wanted and what to do.
#pragma once

#include <string>
#include <utility>

namespace penguin {

class [[nodiscard]] Status {
   public:
    Status() = default;
    static Status error(std::string sentence) {
        Status status;
        status.sentence_ = std::move(sentence);
        return status;
    }
    bool ok() const { return sentence_.empty(); }
    const std::string& sentence() const { return sentence_; }

   private:
    std::string sentence_;
};

}  // namespace penguin
