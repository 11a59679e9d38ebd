// See data.hpp.
#include "data.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <new>

#include "check.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

constexpr std::int64_t pool_size = 8192;
constexpr std::size_t line = 64;

Word random_word(DType dtype, Random& random) {
    const Format format = format_of(dtype);
    const Word any = random.bits() & (format.sign() | (format.sign() - 1));
    const std::int64_t kind = random.below(16);
    if (kind == 0) return any;
    if (kind == 1) {
        const std::vector<Word> special = special_words(dtype);
        return special[static_cast<std::size_t>(random.below(static_cast<std::int64_t>(special.size())))];
    }
    // Any sign and fraction, an exponent from -3 to 2.
    const Word exponent = static_cast<Word>(format.bias() - 3 + random.below(6));
    return (any & (format.sign() | ((Word{1} << format.fraction_bits) - 1))) | (exponent << format.fraction_bits);
}

/// Many random words in their storage format, which `fill` copies from: making them afresh for each array is slow.
const std::vector<std::byte>& pool(DType dtype) {
    static const std::array<std::vector<std::byte>, dtype_count> pools = [] {
        std::array<std::vector<std::byte>, dtype_count> made;
        Random random(1);
        for (const DType type : all_dtypes) {
            std::vector<std::byte>& bytes = made[static_cast<std::size_t>(type)];
            bytes.resize(pool_size * item_size(type));
            for (std::int64_t i = 0; i < pool_size; ++i) write_word(type, bytes.data(), i, random_word(type, random));
        }
        return made;
    }();
    return pools[static_cast<std::size_t>(dtype)];
}

}  // namespace

std::vector<DTypes> all_triples() {
    std::vector<DTypes> triples;
    for (const DType param : all_dtypes) {
        for (const DType grad : all_dtypes) {
            for (const DType momentum : all_dtypes) triples.push_back({param, grad, momentum});
        }
    }
    return triples;
}

// SplitMix64: a counter, mixed.
std::uint64_t Random::bits() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void fill(DType dtype, std::byte* base, std::int64_t size, Random& random) {
    const std::vector<std::byte>& words = pool(dtype);
    const std::size_t item = item_size(dtype);
    for (std::int64_t done = 0; done < size;) {
        const std::int64_t start = random.below(pool_size);
        const std::int64_t count = std::min(size - done, pool_size - start);
        std::memcpy(base + static_cast<std::size_t>(done) * item, words.data() + static_cast<std::size_t>(start) * item,
                    static_cast<std::size_t>(count) * item);
        done += count;
    }
}

std::vector<Word> special_words(DType dtype) {
    const Format format = format_of(dtype);
    const Word one_step = Word{1} << format.fraction_bits;
    std::vector<Word> words;
    for (const Word sign : {Word{0}, format.sign()}) {
        for (const Word magnitude :
             {Word{0}, Word{1}, one_step - 1, one_step, static_cast<Word>(format.bias()) << format.fraction_bits,
              format.infinity() - 1, format.infinity(), format.infinity() + 1, format.infinity() + one_step / 2}) {
            words.push_back(sign | magnitude);
        }
    }
    return words;
}

Word signalling_nan(DType dtype) { return format_of(dtype).infinity() + 1; }

GuardedArray::GuardedArray(std::size_t capacity) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t usable = (capacity + 2 * margin + page - 1) / page * page;
    length_ = usable + 2 * page;
    void* mapping = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<std::byte*>(mapping);
    end_ = mapping_ + page + usable;
    if (mprotect(mapping_ + page, usable, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
}

GuardedArray::~GuardedArray() { munmap(mapping_, length_); }

std::byte* GuardedArray::place(std::size_t size, Placement placement, std::size_t odd) {
    last_ = placement == Placement::odd       ? end_ - odd
            : placement == Placement::aligned ? end_ - (line - size % line) % line
                                              : end_;
    first_ = last_ - size;
    std::fill(first_ - margin, first_, canary);
    std::fill(last_, end_, canary);
    return first_;
}

bool GuardedArray::intact() const {
    const auto untouched = [](std::byte byte) { return byte == canary; };
    return std::all_of(first_ - margin, first_, untouched) && std::all_of(last_, end_, untouched);
}

TestTensor::Array::Array(DType type, std::int64_t size, std::size_t offset, Random& random)
    : dtype(type), bytes(3 * line + offset + static_cast<std::size_t>(size) * item_size(type), canary) {
    const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
    begin = line + (line - address % line) % line + offset;
    fill(dtype, data(), size, random);
    for (std::int64_t i = 0; i < size; ++i) expected.push_back(read_word(dtype, data(), i));
    original = bytes;
    original_expected = expected;
}

TestTensor::TestTensor(DTypes dtypes, std::int64_t size, std::uint32_t hyper, bool first, Random& random,
                       std::size_t offset)
    : dtypes_(dtypes),
      size_(size),
      hyper_(hyper),
      first_(first),
      originally_first_(first),
      param_(dtypes.param, size, offset, random),
      grad_(dtypes.grad, size, offset, random),
      momentum_(dtypes.momentum, size, offset, random) {}

TensorRef TestTensor::ref() {
    TensorRef tensor{.param = param_.data(), .grad = grad_.data(), .states = {momentum_.data()}, .size = size_};
    tensor.hyper = hyper_;
    tensor.param_dtype = dtypes_.param;
    tensor.grad_dtype = dtypes_.grad;
    tensor.state_dtypes[0] = dtypes_.momentum;
    tensor.first_step = first_;
    return tensor;
}

void TestTensor::expect_step(std::span<const SgdHyper> hypers, const StepOptions& options) {
    for (std::size_t i = 0; i < param_.expected.size(); ++i) {
        update_word(dtypes_, hypers[hyper_], first_, param_.expected[i], grad_.expected[i], momentum_.expected[i],
                    options.grad_factor, options.clip_value);
        if (options.zero_grad) grad_.expected[i] = 0;
    }
}

void TestTensor::check_array(const Array& array, const char* name, const std::string& context) const {
    for (std::size_t i = 0; i < array.expected.size(); ++i) {
        const Word word = read_word(array.dtype, array.data(), static_cast<std::int64_t>(i));
        CHECK(same_word(array.dtype, word, array.expected[i]),
              context + ": " + describe(dtypes_) + ", " + name + "[" + std::to_string(i) + "] of " +
                  std::to_string(size_) + " is " + hex(word) + ", not " + hex(array.expected[i]));
    }
    const auto untouched = [](std::byte byte) { return byte == canary; };
    const std::byte *begin = array.bytes.data(), *end = begin + array.bytes.size();
    const std::byte* behind = array.data() + array.expected.size() * item_size(array.dtype);
    CHECK(std::all_of(begin, array.data(), untouched) && std::all_of(behind, end, untouched),
          context + ": written outside " + name);
}

void TestTensor::check(const std::string& context) const {
    check_array(param_, "param", context);
    check_array(grad_, "grad", context);
    check_array(momentum_, "momentum", context);
}

void TestTensor::reset() {
    first_ = originally_first_;
    for (Array* array : {&param_, &grad_, &momentum_}) {
        std::ranges::copy(array->original, array->bytes.begin());
        array->expected = array->original_expected;
    }
}

bool TestTensor::same_bytes(const TestTensor& other) const {
    const auto same = [](const Array& a, const Array& b) {
        const std::size_t size = a.expected.size() * item_size(a.dtype);
        return a.expected.size() == b.expected.size() && std::equal(a.data(), a.data() + size, b.data());
    };
    return same(param_, other.param_) && same(grad_, other.grad_) && same(momentum_, other.momentum_);
}

void step_all(std::span<TestTensor> tensors, std::span<const SgdHyper> hypers, const StepOptions& options) {
    std::vector<TensorRef> refs;
    for (TestTensor& tensor : tensors) refs.push_back(tensor.ref());
    step(refs, hypers, options);
}

}  // namespace sgdcore::test
