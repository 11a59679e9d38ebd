// Conversions between storage types, through steps whose arithmetic changes nothing: with lr = -1 and p = -0 the rule
// is p = fma(1, g, -0), which is g; the first momentum is g as well.
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.hpp"
#include "data.hpp"
#include "float_modes.hpp"
#include "reference.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

/// An array of words in their storage format.
class Packed {
  public:
    Packed(DType dtype, const std::vector<Word>& words) : dtype_(dtype), bytes_(words.size() * item_size(dtype)) {
        for (std::size_t i = 0; i < words.size(); ++i)
            write_word(dtype, data(), static_cast<std::int64_t>(i), words[i]);
    }
    Packed(DType dtype, std::size_t size, Word word) : Packed(dtype, std::vector<Word>(size, word)) {}

    std::byte* data() { return bytes_.data(); }
    Word operator[](std::size_t i) const { return read_word(dtype_, bytes_.data(), static_cast<std::int64_t>(i)); }

  private:
    DType dtype_;
    std::vector<std::byte> bytes_;
};

Word negative_zero(DType dtype) { return format_of(dtype).sign(); }

void run_step(const DTypes& dtypes, Packed& param, Packed& grad, Packed& momentum, std::size_t size,
              const SgdHyper& hyper, bool first) {
    TensorRef tensor{.param = param.data(), .grad = grad.data(), .states = {momentum.data()}};
    tensor.size = static_cast<std::int64_t>(size);
    tensor.param_dtype = dtypes.param;
    tensor.grad_dtype = dtypes.grad;
    tensor.state_dtypes[0] = dtypes.momentum;
    tensor.first_step = first;
    step({&tensor, 1}, {&hyper, 1}, {});
}

/// Converts `words` from one storage type to two others at once: to the parameter's and to the momentum's.
struct Converted {
    Packed param, momentum;
};
Converted convert(DType from, const std::vector<Word>& words, DType to_param, DType to_momentum) {
    Packed grad(from, words);
    Converted out{Packed(to_param, words.size(), negative_zero(to_param)),
                  Packed(to_momentum, words.size(), signalling_nan(to_momentum))};
    run_step({to_param, from, to_momentum}, out.param, grad, out.momentum, words.size(), {.lr = -1, .momentum = 1},
             true);
    return out;
}

void check_words(DType dtype, const Packed& actual, const std::vector<Word>& expected, DType from,
                 const std::vector<Word>& source) {
    for (std::size_t i = 0; i < expected.size(); ++i) {
        CHECK(same_word(dtype, actual[i], expected[i]), std::string(dtype_name(from)) + " " + hex(source[i]) +
                                                            " became " + dtype_name(dtype) + " " + hex(actual[i]) +
                                                            ", not " + hex(expected[i]));
    }
}

std::vector<Word> encode_all(DType dtype, const std::vector<double>& values) {
    std::vector<Word> words;
    for (const double value : values) words.push_back(encode(dtype, value));
    return words;
}

std::vector<Word> all_short_words() {
    std::vector<Word> words;
    for (Word word = 0; word < 0x10000; ++word) words.push_back(word);
    return words;
}

/// Every way `words` can be narrowed or widened to each storage type.
void check_conversions(DType from, const std::vector<Word>& words) {
    std::vector<double> values;
    for (const Word word : words) values.push_back(decode(from, word));
    for (const DType to : all_dtypes) {
        const std::vector<Word> expected = encode_all(to, values);
        for (const DType other : all_dtypes) {
            // The other storage type decides whether the conversion goes through float32 or float64.
            check_words(to, convert(from, words, to, other).param, expected, from, words);
            check_words(to, convert(from, words, other, to).momentum, expected, from, words);
        }
    }
}

/// Calls visit(value, word) with values whose nearest word is known without rounding anything: all numbers of a short
/// format, all points halfway between two of them, and the closest numbers of type T on either side.
template <class T, class Visit>
void visit_rounding(DType dtype, Visit visit) {
    const Format format = format_of(dtype);
    const T infinity = std::numeric_limits<T>::infinity();
    const auto both_signs = [&](T value, Word word) {
        visit(value, word);
        visit(-value, word | format.sign());
    };
    for (Word word = 0; word < format.infinity(); ++word) {
        const double low = decode(dtype, word);
        // The largest number is followed by where the next one would be, if the exponent went on.
        const double high = word + 1 == format.infinity() ? 2 * low - decode(dtype, word - 1) : decode(dtype, word + 1);
        const double halfway = low + (high - low) / 2;
        // Exact: both types have bits to spare, also where the short format is subnormal.
        const T l = static_cast<T>(low), h = static_cast<T>(halfway);
        both_signs(l, word);
        both_signs(std::nextafter(l, infinity), word);
        if (word > 0) both_signs(std::nextafter(l, T{0}), word);
        both_signs(h, word % 2 == 0 ? word : word + 1);
        both_signs(std::nextafter(h, T{0}), word);
        both_signs(std::nextafter(h, infinity), word + 1);
    }
}

}  // namespace

TEST(conversions, all_words_of_the_short_formats) {
    for (const DType from : {DType::float16, DType::bfloat16}) {
        check_conversions(from, all_short_words());
        // As parameters: p = fma(1, -0, p). As momentum: b = fma(0, -0, 1 * b), and then p = b.
        const std::vector<Word> words = all_short_words();
        std::vector<double> values;
        for (const Word word : words) values.push_back(decode(from, word));
        for (const DType other : all_dtypes) {
            Packed param(from, words), grad(other, words.size(), negative_zero(other));
            Packed unused(DType::float32, words.size(), 0);
            run_step({from, other, DType::float32}, param, grad, unused, words.size(), {.lr = -1}, false);
            check_words(from, param, words, from, words);

            Packed momentum(from, words), wide(other, words.size(), negative_zero(other));
            Packed nothing(DType::float32, words.size(), negative_zero(DType::float32));
            const SgdHyper keep{.lr = -1, .momentum = 1, .dampening = 1};
            run_step({other, DType::float32, from}, wide, nothing, momentum, words.size(), keep, false);
            check_words(from, momentum, words, from, words);
            check_words(other, wide, encode_all(other, values), from, words);
        }
    }
}

TEST(conversions, halfway_points_and_neighbours_of_float32) {
    for (const DType to : {DType::float16, DType::bfloat16}) {
        std::vector<Word> words, expected;
        visit_rounding<float>(to, [&](float value, Word word) {
            words.push_back(std::bit_cast<std::uint32_t>(value));
            expected.push_back(word);
            CHECK(encode(to, static_cast<double>(value)) == word, "the reference is wrong at " + hex(words.back()));
        });
        // The wide momentum has the same conversion start from float64.
        for (const DType other : {DType::float32, DType::float64}) {
            check_words(to, convert(DType::float32, words, to, other).param, expected, DType::float32, words);
            check_words(to, convert(DType::float32, words, other, to).momentum, expected, DType::float32, words);
        }
    }
}

TEST(conversions, halfway_points_and_neighbours_of_float64) {
    // The neighbours are far closer to the halfway point than a float32 is: rounding to float32 first would put them on
    // it, and round a second time from there.
    for (const DType to : {DType::float16, DType::bfloat16}) {
        std::vector<Word> words, expected;
        visit_rounding<double>(to, [&](double value, Word word) {
            words.push_back(std::bit_cast<Word>(value));
            expected.push_back(word);
            CHECK(encode(to, value) == word, "the reference is wrong at " + hex(words.back()));
        });
        const Converted out = convert(DType::float64, words, to, to);
        check_words(to, out.param, expected, DType::float64, words);
        check_words(to, out.momentum, expected, DType::float64, words);
    }
}

TEST(conversions, double_rounding_traps) {
    // Around halfway points of the short formats, at every distance from where float32 still tells them apart down to
    // float64's last bit; around halfway points of float32; and beyond both ends of float32's range.
    Random random(4);
    std::vector<Word> words;
    const auto add = [&](double value) {
        for (const double v : {value, std::nextafter(value, 0.0), std::nextafter(value, HUGE_VAL)}) {
            words.push_back(std::bit_cast<Word>(v));
            words.push_back(std::bit_cast<Word>(-v));
        }
    };
    for (int i = 0; i < (reduced ? 20 : 300); ++i) {
        for (const DType to : {DType::float16, DType::bfloat16, DType::float32}) {
            const Format format = format_of(to);
            const auto word = static_cast<Word>(random.below(static_cast<std::int64_t>(format.infinity()) - 1));
            const double low = decode(to, word), halfway = low + (decode(to, word + 1) - low) / 2;
            for (int bits = 20; bits < 53; ++bits) {
                add(halfway * (1 + std::ldexp(1.0, -bits)));
                add(halfway * (1 - std::ldexp(1.0, -bits)));
            }
        }
    }
    for (const double value : {0x1p-149, 0x1p-150,   0x1.8p-150, 0x1p-151,       0x1p-126,
                               0x1p-127, 0x1p-133,   0x1p-134,   0x1p-1022,      0x1p-1074,
                               0x1p-24,  0x1p-25,    0x1.8p-25,  0x1p-14,        65504.0,
                               65519.0,  65520.0,    65536.0,    0x1.fffffep127, 0x1.ffffffp127,
                               0x1p128,  0x1.fep127, 0x1.ffp127, 0x1p200,        std::numeric_limits<double>::max()}) {
        add(value);
    }
    check_conversions(DType::float64, words);
}

TEST(conversions, samples_of_all_float32_words) {
    // A step without a common factor with 2^32 visits every exponent with ever different fractions.
    std::vector<Word> words;
    for (Word word = 0; word < Word{1} << 32; word += reduced ? 1'000'003 : 40'009) words.push_back(word);
    check_conversions(DType::float32, words);
}

TEST(conversions, special_words_keep_their_kind) {
    for (const DType from : all_dtypes) {
        std::vector<Word> words = special_words(from);
        // A NaN whose fraction is all in the bits that a shorter format drops must not become infinity.
        const Format format = format_of(from);
        for (int bit = 0; bit < format.fraction_bits; ++bit) {
            words.push_back(format.infinity() | Word{1} << bit);
            words.push_back(format.sign() | format.infinity() | Word{1} << bit);
        }
        check_conversions(from, words);
        for (const DType to : all_dtypes) {
            const Converted out = convert(from, words, to, to);
            for (std::size_t i = 0; i < words.size(); ++i) {
                const bool from_sign = (words[i] & format.sign()) != 0;
                const bool to_sign = (out.momentum[i] & format_of(to).sign()) != 0;
                CHECK(from_sign == to_sign, std::string(dtype_name(from)) + " " + hex(words[i]) + " became " +
                                                dtype_name(to) + " " + hex(out.momentum[i]));
            }
        }
    }
}

TEST(conversions, exact_in_every_floating_point_mode) {
    // Some libraries switch subnormal numbers off for the whole process. Arithmetic then loses them, but conversions
    // between float32 and the short formats do not count as arithmetic: b = g. Nor does another rounding mode change
    // them.
    for (const DType from : {DType::float32, DType::float16, DType::bfloat16}) {
        std::vector<Word> words = all_short_words();
        if (from == DType::float32) {
            for (Word& word : words) word = word * 65537 & 0xffffffff;
        }
        for (const DType to : {DType::float32, DType::float16, DType::bfloat16}) {
            std::vector<Word> expected;
            for (const Word word : words) expected.push_back(encode(to, decode(from, word)));
            for (const CallersMode& mode : all_modes) {
                const ModeForScope scope(mode);
                const Converted out = convert(from, words, DType::float32, to);
                const ModeForScope standard(CallersMode{});
                check_words(to, out.momentum, expected, from, words);
            }
        }
    }
}

}  // namespace sgdcore::test
