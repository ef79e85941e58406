// An ONNX model of one node, written as the protobuf that it is; field numbers are those of onnx.proto.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace penguin {

struct Port {
    std::string name;
    int type;  // of its elements, as in onnx.proto
    std::vector<std::int64_t> shape;
};

namespace protobuf {

inline std::string number(std::uint64_t x) {
    std::string bytes;
    for (; x >= 128; x >>= 7) bytes += static_cast<char>(x | 128);
    return bytes + static_cast<char>(x);
}

inline std::string field(unsigned id, std::int64_t x) {
    return number(id << 3) + number(static_cast<std::uint64_t>(x));
}

inline std::string field(unsigned id, const std::string& content) {
    return number(id << 3 | 2) + number(content.size()) + content;
}

inline std::string port(const Port& of) {
    std::string dims;
    for (const std::int64_t size : of.shape) dims += field(1, field(1, size));
    return field(1, of.name) + field(2, field(1, field(1, of.type) + field(2, dims)));
}

}  // namespace protobuf

inline std::string one_node_model(const std::string& op, const std::string& domain, const std::vector<Port>& inputs,
                                  const std::vector<Port>& outputs,
                                  const std::vector<std::pair<std::string, std::int64_t>>& attributes) {
    using protobuf::field;
    std::string node, ports;
    for (const Port& each : inputs) node += field(1, each.name), ports += field(11, protobuf::port(each));
    for (const Port& each : outputs) node += field(2, each.name), ports += field(12, protobuf::port(each));
    node += field(4, op) + field(7, domain);
    for (const auto& [name, value] : attributes) node += field(5, field(1, name) + field(3, value) + field(20, 2));
    const std::string graph = field(1, node) + field(2, std::string("one node")) + ports;
    return field(1, 10) + field(7, graph) + field(8, field(1, std::string()) + field(2, 21)) +
           field(8, field(1, domain) + field(2, 1));
}

}  // namespace penguin
