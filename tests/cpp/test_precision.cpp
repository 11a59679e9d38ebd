// The conversions of parameters in a precision of their own, for each instruction set, against definitions that compare
// distances in float64.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.hpp"
#include "cpu/dispatch.hpp"
#include "data.hpp"
#include "float_modes.hpp"
#include "precision.hpp"
#include "reference.hpp"

namespace sgdcore::test {
namespace {

constexpr DType halves[] = {DType::float16, DType::bfloat16};

bool has(Precision precision, DType dtype) { return precision == Precision::kahan || dtype == DType::bfloat16; }

/// Words around every boundary of the conversions to 16 bits, of both signs, and random ones.
std::vector<std::uint32_t> float32_words() {
    std::vector<std::uint32_t> words;
    for (std::uint32_t upper = 0; upper < 0x8000; upper += upper < 0x0100 || upper >= 0x7f00 ? 1 : 5) {
        for (const std::uint32_t lower : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
            words.push_back(upper << 16 | lower);
        // Half of float16's last bit.
        for (const std::uint32_t lower : {0x0fffu, 0x1000u, 0x1001u, 0x2fffu, 0x3000u, 0x3001u}) {
            words.push_back(upper << 16 | lower);
        }
    }
    Random random(20);
    while (words.size() % 1024 != 1001 || words.size() < 200'000) {
        words.push_back(static_cast<std::uint32_t>(random.bits()) & 0x7fffffffu);
    }
    const std::size_t positive = words.size();
    for (std::size_t i = 0; i < positive; ++i) words.push_back(words[i] | 0x80000000u);
    return words;
}

bool is_nan32(std::uint32_t word) { return (word & 0x7fffffffu) > 0x7f800000u; }

/// The bfloat16 nearest to a float32 that is no NaN; of two, the one farther from zero.
std::uint32_t nearest_away(std::uint32_t word) {
    const std::uint32_t magnitude = word & 0x7fffffffu, below = magnitude >> 16, above = below + 1;
    const auto value = [](std::uint32_t upper) {  // what would follow the largest finite number is 2^128
        return upper == 0x7f80u ? std::ldexp(1.0, 128) : decode(DType::bfloat16, upper);
    };
    if (magnitude == 0x7f800000u) return word >> 16;
    const double exact = decode(DType::float32, magnitude);
    return (exact - value(below) < value(above) - exact ? below : above) | ((word >> 16) & 0x8000u);
}

/// `random` decides between the two neighbours: see storage::Stochastic.
Word stochastically(DType dtype, std::uint32_t word, std::uint32_t random) {
    const Format format = format_of(dtype);
    const Word sign = (word & 0x80000000u) != 0 ? format.sign() : 0;
    const double magnitude = decode(DType::float32, word & 0x7fffffffu);
    if (std::isinf(magnitude)) return sign | format.infinity();
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent - 1, 1 - format.bias());
    const double steps = std::ldexp(magnitude, format.fraction_bits - exponent), whole = std::floor(steps);
    const bool up = std::floor((steps - whole) * 65536) + random >= 65536;
    const Word result = (static_cast<Word>(exponent + format.bias() - 1) << format.fraction_bits) +
                        static_cast<Word>(whole) + (up ? 1 : 0);
    return sign | std::min(result, format.infinity());
}

const cpu::KernelTable& table() { return *cpu::instruction_set().table; }

/// Parts `words` at an odd address, with canaries behind.
struct Parted {
    std::vector<std::byte> visible, rest;
    Parted(Precision precision, DType dtype, const std::vector<std::uint32_t>& words)
        : visible(2 * words.size() + 2, canary), rest(visible) {
        table().part[static_cast<int>(precision)][static_cast<int>(dtype)](
            reinterpret_cast<const std::byte*>(words.data()), std::ssize(words), visible.data() + 1, rest.data() + 1);
    }
    Word seen(std::size_t i) const {
        return read_word(DType::float16, visible.data() + 1, static_cast<std::int64_t>(i));
    }
    Word kept(std::size_t i) const { return read_word(DType::float16, rest.data() + 1, static_cast<std::int64_t>(i)); }
    bool intact() const { return visible.back() == canary && rest.back() == canary; }
};

std::vector<std::uint32_t> join(Precision precision, DType dtype, const std::vector<std::byte>& visible,
                                const std::vector<std::byte>& rest, std::size_t size) {
    std::vector<std::uint32_t> words(size);
    table().join[static_cast<int>(precision)][static_cast<int>(dtype)](visible.data() + 1, rest.data() + 1,
                                                                       static_cast<std::int64_t>(size),
                                                                       reinterpret_cast<std::byte*>(words.data()));
    return words;
}

}  // namespace

TEST(precision, split_is_exact) {
    const std::vector<std::uint32_t> words = float32_words();
    for (const CallersMode& mode : all_modes) {
        const ModeForScope scope(mode);
        const Parted parted(Precision::split, DType::bfloat16, words);
        const auto back = join(Precision::split, DType::bfloat16, parted.visible, parted.rest, words.size());
        CHECK(parted.intact());
        for (std::size_t i = 0; i < words.size(); ++i) {
            const std::uint32_t word = words[i];
            const bool hidden = (word & 0x7fff8000u) == 0x7fff8000u;
            CHECK(back[i] == (hidden ? word & ~0x8000u : word), hex(word) + " came back as " + hex(back[i]));
            const auto low = static_cast<std::uint32_t>(static_cast<std::int16_t>(parted.kept(i)));
            CHECK(back[i] == (static_cast<std::uint32_t>(parted.seen(i)) << 16) + low, hex(word));
            if (!is_nan32(word)) {
                CHECK(parted.seen(i) == nearest_away(word), hex(word) + " is seen as " + hex(parted.seen(i)));
            } else if ((word & 0x00400000u) != 0) {
                CHECK(is_nan(DType::bfloat16, parted.seen(i)), hex(word) + " is seen as " + hex(parted.seen(i)));
            }
        }
    }
}

TEST(precision, kahan_keeps_the_rounded_rest) {
    const std::vector<std::uint32_t> words = float32_words();
    for (const DType dtype : halves) {
        const Parted parted(Precision::kahan, dtype, words);
        const auto back = join(Precision::kahan, dtype, parted.visible, parted.rest, words.size());
        CHECK(parted.intact());
        for (std::size_t i = 0; i < words.size(); ++i) {
            const double value = decode(DType::float32, words[i]);
            if (is_nan32(words[i])) {
                if ((words[i] & 0x00400000u) == 0) continue;  // no arithmetic gives a signalling NaN
                CHECK(is_nan(dtype, parted.seen(i)) && parted.kept(i) == 0, hex(words[i]));
                continue;
            }
            const auto rounded = [dtype = dtype](double number) {
                if (dtype == DType::float16) return encode(dtype, number);
                return Word{nearest_away(std::bit_cast<std::uint32_t>(static_cast<float>(number)))};
            };
            const Word visible = rounded(value);
            const double lost = value - decode(dtype, visible);
            const Word rest = std::isfinite(lost) ? rounded(lost) : 0;
            CHECK(parted.seen(i) == visible && parted.kept(i) == rest,
                  std::string(dtype_name(dtype)) + " " + hex(words[i]) + " became " + hex(parted.seen(i)) + ", " +
                      hex(parted.kept(i)) + ", not " + hex(visible) + ", " + hex(rest));
            const auto sum = static_cast<float>(decode(dtype, visible) + decode(dtype, rest));
            CHECK(back[i] == std::bit_cast<std::uint32_t>(sum), hex(words[i]) + " came back as " + hex(back[i]));
        }
    }
}

TEST(precision, stochastic_takes_the_bits_of_an_element_by_its_index) {
    const std::vector<std::uint32_t> words = float32_words();
    const storage::RandomBits bits(3, 5, 7);
    const std::int64_t many = reduced ? 3000 : 40'000;
    // Around the start of a pair, of a vector, of the upper half of a pair's number; and other strides.
    for (const std::int64_t first : {std::int64_t{0}, std::int64_t{1}, std::int64_t{62}, (std::int64_t{1} << 33) - 1001,
                                     (std::int64_t{5} << 33) - 40}) {
        for (const std::int64_t stride : {1, 2, 9, 64, 1001}) {
            for (const DType dtype : halves) {
                std::int64_t from = 0;
                for (const std::int64_t size : {std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, std::int64_t{17},
                                                std::int64_t{63}, std::int64_t{1024}, many}) {
                    std::vector<std::byte> out(2 * static_cast<std::size_t>(size) + 2, canary);
                    table().encode_stochastic[static_cast<int>(dtype)](
                        reinterpret_cast<const std::byte*>(words.data() + from), size, out.data() + 1, bits, first,
                        stride);
                    CHECK(out.back() == canary);
                    for (std::int64_t i = 0; i < size; ++i) {
                        const std::uint32_t word = words[static_cast<std::size_t>(from + i)];
                        const Word actual = read_word(dtype, out.data() + 1, i);
                        if (is_nan32(word)) {
                            CHECK((word & 0x00400000u) == 0 || is_nan(dtype, actual), hex(word));
                            continue;
                        }
                        const std::uint32_t random = bits.of(static_cast<std::uint64_t>(first + i * stride));
                        const Word expected = stochastically(dtype, word, random);
                        CHECK(actual == expected, std::string(dtype_name(dtype)) + " " + hex(word) + " became " +
                                                      hex(actual) + ", not " + hex(expected) + "; first " +
                                                      std::to_string(first) + " stride " + std::to_string(stride) +
                                                      " i " + std::to_string(i));
                    }
                    from = (from + size * 7 + 13) % (std::ssize(words) - many);
                }
            }
        }
    }
}

TEST(precision, tables_have_what_a_precision_needs) {
    for (const Precision precision : {Precision::split, Precision::kahan}) {
        for (const DType dtype : all_dtypes) {
            const bool known = item_size(dtype) == 2 && has(precision, dtype);
            const int p = static_cast<int>(precision), d = static_cast<int>(dtype);
            CHECK((table().join[p][d] != nullptr) == known && (table().part[p][d] != nullptr) == known,
                  std::string(precision_name(precision)) + " " + dtype_name(dtype));
        }
    }
}

}  // namespace sgdcore::test
