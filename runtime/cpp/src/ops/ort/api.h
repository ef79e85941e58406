// ONNX Runtime's C interface, as far as the operators use it. Nothing of it is linked: the table of functions comes
// from the library that loads us, so that one build runs on every version from kApiVersion on.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <exception>
#include <string>

#include "../status.h"

namespace penguin::ort {

// Version of the interface that ONNX Runtime 1.24 has: it holds all that the operators call.
constexpr std::uint32_t kApiVersion = 24;

// A failure inside this library; it never leaves it: `guarded` turns it into an OrtStatus.
struct Failure {
    OrtStatus* status;
};

inline void check(OrtStatus* status) {
    if (status) throw Failure{status};
}

[[noreturn]] inline void refuse(const OrtApi& api, const std::string& sentence) {
    throw Failure{api.CreateStatus(ORT_INVALID_ARGUMENT, sentence.c_str())};
}

// Calls `body` and gives what it threw as a status; null: it was done.
template <class Body>
OrtStatus* guarded(const OrtApi& api, const Body& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::exception& error) {
        return api.CreateStatus(ORT_FAIL, error.what());
    }
}

// Shape and type of a tensor; the shape belongs to the tensor.
struct TensorView {
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    const std::int64_t* shape = nullptr;
    std::size_t rank = 0;
    const void* data = nullptr;

    std::int64_t count() const {
        std::int64_t product = 1;
        for (std::size_t i = 0; i < rank; i++) product *= shape[i];
        return product;
    }
    std::string shape_text() const {
        std::string text = "[";
        for (std::size_t i = 0; i < rank; i++) text += (i ? ", " : "") + std::to_string(shape[i]);
        return text + "]";
    }
};

inline TensorView view(const OrtApi& api, const OrtValue* value) {
    TensorView tensor;
    check(api.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &tensor.shape, &tensor.rank));
    check(api.GetTensorData(value, &tensor.data));
    return tensor;
}

}  // namespace penguin::ort
