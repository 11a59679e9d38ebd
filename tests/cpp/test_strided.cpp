// Gradients whose memory order differs from their parameter's: permuted, reversed, spread out, repeated.
#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "reference.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

/// How a gradient lies in memory.
struct Layout {
    std::vector<std::int64_t> shape;  // in the parameter's memory order
    std::vector<int> order;           // its axes in the gradient's memory order, slowest first
    unsigned reversed = 0;            // bit per axis: negative stride
    unsigned repeated = 0;            // bit per axis: stride zero
    std::int64_t gap = 0;             // bytes between neighbouring elements

    std::string text() const {
        std::string text = "shape";
        for (const std::int64_t length : shape) text += " " + std::to_string(length);
        text += ", order";
        for (const int axis : order) text += " " + std::to_string(axis);
        return text + ", reversed " + std::to_string(reversed) + ", repeated " + std::to_string(repeated) + ", gap " +
               std::to_string(gap);
    }
};

/// The axes of a layout for elements of `item` bytes.
std::vector<Axis> axes_of(const Layout& layout, std::int64_t item) {
    std::vector<Axis> axes(layout.shape.size());
    std::int64_t stride = item + layout.gap;
    for (auto axis = layout.order.rbegin(); axis != layout.order.rend(); ++axis) {
        const auto i = static_cast<std::size_t>(*axis);
        const bool repeated = (layout.repeated >> i & 1) != 0, reversed = (layout.reversed >> i & 1) != 0;
        axes[i] = {layout.shape[i], repeated ? 0 : reversed ? -stride : stride};
        if (!repeated) stride *= layout.shape[i];
    }
    return axes;
}

/// The bytes from the gradient's address to element `index`, counted in the parameter's order.
std::int64_t offset_of(const std::vector<Axis>& axes, std::int64_t index) {
    std::int64_t offset = 0;
    for (std::size_t axis = axes.size(); axis-- > 0;) {
        offset += index % axes[axis].length * axes[axis].stride;
        index /= axes[axis].length;
    }
    return offset;
}

const SgdHyper plain{.lr = 0.1, .weight_decay = 0.01};
const SgdHyper nesterov{.lr = 0.1, .momentum = 0.9, .dampening = 0.3, .weight_decay = 0.01, .nesterov = true};

/// Takes one step with a strided gradient and compares all bytes, also those between the gradient's elements.
void check_axes(const DTypes& dtypes, const std::vector<Axis>& axes, const SgdHyper& hyper, bool zero_grad,
                const std::string& layout) {
    constexpr std::size_t margin = 64;
    static Random random(5);
    const StepOptions options{.zero_grad = zero_grad,
                              .grad_factor = random.below(3) == 0 ? 0.3 : 1,
                              .clip_value = random.below(3) == 0 ? 0.5 : std::numeric_limits<double>::infinity()};
    const auto item = static_cast<std::int64_t>(item_size(dtypes.grad));
    std::int64_t size = 1, lowest = 0, highest = 0;
    for (const Axis& axis : axes) {
        size *= axis.length;
        (axis.stride < 0 ? lowest : highest) += (axis.length - 1) * axis.stride;
    }
    std::vector<std::byte> grad(static_cast<std::size_t>(highest - lowest + item) + 2 * margin, canary);
    std::byte* start = grad.data() + margin - lowest;
    for (std::int64_t i = 0; i < size; ++i) fill(dtypes.grad, start + offset_of(axes, i), 1, random);

    std::vector<std::byte> param(static_cast<std::size_t>(size) * item_size(dtypes.param) + 2 * margin, canary);
    std::vector<std::byte> momentum(static_cast<std::size_t>(size) * item_size(dtypes.momentum) + 2 * margin, canary);
    fill(dtypes.param, param.data() + margin, size, random);
    fill(dtypes.momentum, momentum.data() + margin, size, random);

    // A repeated element is read by all its readers before it is cleared.
    std::vector<std::byte> expected_grad = grad, expected_param = param, expected_momentum = momentum;
    for (std::int64_t i = 0; i < size; ++i) {
        Word p = read_word(dtypes.param, param.data() + margin, i),
             b = read_word(dtypes.momentum, momentum.data() + margin, i);
        const Word g = read_word(dtypes.grad, start + offset_of(axes, i), 0);
        update_word(dtypes, hyper, false, p, g, b, options.grad_factor, options.clip_value);
        write_word(dtypes.param, expected_param.data() + margin, i, p);
        write_word(dtypes.momentum, expected_momentum.data() + margin, i, b);
        if (zero_grad) write_word(dtypes.grad, expected_grad.data() + margin - lowest + offset_of(axes, i), 0, 0);
    }

    TensorRef tensor{.param = param.data() + margin, .grad = start, .states = {momentum.data() + margin}, .size = size};
    tensor.grad_axes = axes;
    tensor.param_dtype = dtypes.param;
    tensor.grad_dtype = dtypes.grad;
    tensor.state_dtypes[0] = dtypes.momentum;
    step({&tensor, 1}, {&hyper, 1}, options);

    const auto text = [&] {
        return describe(dtypes) + (zero_grad ? ", zero_grad, " : ", ") +
               "grad_factor=" + std::to_string(options.grad_factor) + ", " + layout;
    };
    for (std::int64_t i = 0; i < size; ++i) {
        const Word p = read_word(dtypes.param, param.data() + margin, i);
        const Word b = read_word(dtypes.momentum, momentum.data() + margin, i);
        CHECK(same_word(dtypes.param, p, read_word(dtypes.param, expected_param.data() + margin, i)),
              "param[" + std::to_string(i) + "]: " + text());
        CHECK(same_word(dtypes.momentum, b, read_word(dtypes.momentum, expected_momentum.data() + margin, i)),
              "momentum[" + std::to_string(i) + "]: " + text());
    }
    CHECK(grad == expected_grad, "the gradient's memory: " + text());
    const auto same_margins = [](const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
        return std::equal(a.begin(), a.begin() + margin, b.begin()) &&
               std::equal(a.end() - margin, a.end(), b.end() - margin);
    };
    CHECK(same_margins(param, expected_param), "written outside param: " + text());
    CHECK(same_margins(momentum, expected_momentum), "written outside momentum: " + text());
}

void check_layout(const DTypes& dtypes, const Layout& layout, const SgdHyper& hyper, bool zero_grad) {
    check_axes(dtypes, axes_of(layout, static_cast<std::int64_t>(item_size(dtypes.grad))), hyper, zero_grad,
               layout.text());
}

/// Calls visit(layout) with every order and every choice of reversed and repeated axes of a shape.
template <class Visit>
void visit_layouts(const std::vector<std::int64_t>& shape, std::int64_t gap, Visit visit) {
    std::vector<int> order(shape.size());
    std::iota(order.begin(), order.end(), 0);
    const unsigned choices = 1u << shape.size();
    do {
        for (unsigned reversed = 0; reversed < choices; ++reversed) {
            for (unsigned repeated = 0; repeated < choices; ++repeated)
                visit(Layout{shape, order, reversed, repeated, gap});
        }
    } while (std::ranges::next_permutation(order).found);
}

}  // namespace

TEST(strided, every_layout_of_one_to_four_axes) {
    const std::vector<DTypes> triples = all_triples();
    Random random(6);
    for (const std::vector<std::int64_t>& shape :
         {std::vector<std::int64_t>{1}, {7}, {1, 5}, {3, 4}, {2, 1, 3}, {3, 4, 5}, {2, 3, 2, 4}}) {
        for (const std::int64_t gap : {0, 1, 8}) {
            if (reduced && gap != 1) continue;
            visit_layouts(shape, gap, [&](const Layout& layout) {
                const DTypes& dtypes = triples[static_cast<std::size_t>(random.below(std::ssize(triples)))];
                for (const bool zero_grad : {false, true}) {
                    check_layout(dtypes, layout, random.below(3) == 0 ? plain : nesterov, zero_grad);
                }
            });
        }
    }
}

TEST(strided, block_boundary) {
    // Strided gradients are gathered in blocks of 1024 elements, which end in the middle of rows.
    std::size_t count = 0;
    const std::vector<DTypes> triples = all_triples();
    for (const std::vector<std::int64_t>& shape : {std::vector<std::int64_t>{1023},
                                                   {1024},
                                                   {1025},
                                                   {2049},
                                                   {37, 53},
                                                   {2, 1024},
                                                   {1024, 2},
                                                   {5, 7, 59},
                                                   {3, 4, 5, 41}}) {
        visit_layouts(shape, 0, [&](const Layout& layout) {
            if (++count % (reduced ? 67 : 13) != 0) return;
            for (const bool zero_grad : {false, true}) {
                check_layout(triples[count % triples.size()], layout, nesterov, zero_grad);
            }
        });
    }
    for (const DTypes& dtypes : triples) {
        for (const bool zero_grad : {false, true})
            check_layout(dtypes, {{37, 53}, {1, 0}, 1, 0, 0}, nesterov, zero_grad);
    }
}

TEST(strided, cut_between_threads) {
    cpu::set_num_threads(3);
    const DTypes dtypes{DType::float32, DType::bfloat16, DType::float32};
    for (const unsigned repeated : {0u, 1u, 2u, 7u}) {
        for (const bool zero_grad : {false, true}) {
            check_layout(dtypes, {{300, 1, 401}, {2, 0, 1}, 1, repeated, 0}, nesterov, zero_grad);
        }
    }
    cpu::set_num_threads(0);
}

TEST(strided, elements_that_share_memory) {
    // Sliding windows, and windows over windows of every step.
    cpu::set_num_threads(2);
    const DTypes dtypes{DType::float32, DType::float16, DType::bfloat16};
    for (const std::int64_t stride : {-4, -2, 0, 2, 4, 6}) {
        for (const bool zero_grad : {false, true}) {
            const std::string text = "windows of stride " + std::to_string(stride);
            check_axes(dtypes, {{50, 2}, {40, stride}}, nesterov, zero_grad, text);
            check_axes(dtypes, {{50, stride}, {40, 2}}, nesterov, zero_grad, text);
            check_axes(dtypes, {{40, 2}, {50, stride}, {40, 4}}, nesterov, zero_grad, text);
        }
    }
    cpu::set_num_threads(0);
}

TEST(strided, many_axes) {
    // NumPy allows 64. Most have length one; their strides mean nothing.
    std::vector<Axis> axes(max_dimensions, Axis{1, 1'000'003});
    axes[3] = {5, 4};
    axes[40] = {300, 20};
    axes[63] = {2, -6000};
    for (const bool zero_grad : {false, true}) {
        check_axes({DType::float32, DType::float32, DType::float32}, axes, nesterov, zero_grad, "64 axes");
    }
}

}  // namespace sgdcore::test
