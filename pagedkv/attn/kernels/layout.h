// Where the parts of a page lie, and how a kernel reaches the pages of a table.

FN constexpr int least(int a, int b) { return a < b ? a : b; }

CONSTANT int VALUE_GROUPS = PADDED_VALUE_DIM / VALUE_GROUP;
CONSTANT int PAGE_GROUPS = PAGE_TOKENS / 64;

// Codes in words, scales and biases in 16-bit numbers, from the page's start.
template <int KEY_BITS, int VALUE_BITS> struct Layout {
  static CONSTANT bool coded = KEY_BITS != 16;
  static CONSTANT int key_row = PAGE_TOKENS * KEY_BITS / 32;
  static CONSTANT int value_row = coded ? PADDED_VALUE_DIM * VALUE_BITS / 32 : VALUE_DIM / 2;
  static CONSTANT int key_scales = 2 * HEADS * KEY_DIM * key_row;
  static CONSTANT int key_biases = key_scales + HEADS * KEY_DIM * PAGE_GROUPS;
  static CONSTANT int values = HEADS * KEY_DIM * (coded ? key_row + PAGE_GROUPS : key_row);
  static CONSTANT int value_scales = 2 * (values + HEADS * PAGE_TOKENS * value_row);
  static CONSTANT int value_biases = value_scales + HEADS * PAGE_TOKENS * VALUE_GROUPS;
  // 16-bit pages have no scales.
  static CONSTANT int words = (coded ? value_biases + HEADS * PAGE_TOKENS * VALUE_GROUPS : value_scales) / 2;
};

// Each precision has an array of pages, the slab, and if there is STAGING another one: pages on their
// way through from disk.
#if STAGING
#define SOURCE_PARAMETER(index, key_bits, value_bits, page_words) , BUFFER source##index, BUFFER staged##index
#define SOURCE_ARGUMENT(index, key_bits, value_bits, page_words) , source##index, staged##index
#define SOURCE_OF(place, index) (place >> 31 ? staged##index : source##index)
#else
#define SOURCE_PARAMETER(index, key_bits, value_bits, page_words) , BUFFER source##index
#define SOURCE_ARGUMENT(index, key_bits, value_bits, page_words) , source##index
#define SOURCE_OF(place, index) source##index
#endif
#define ON_SOURCE(index, key_bits, value_bits, page_words)                                    \
  case index: {                                                                               \
    BUFFER page = SOURCE_OF(tile.place, index) + u64(tile.place & 0xfffffff) * page_words;    \
    DO(key_bits, value_bits)                                                                  \
  } break;
#if TREATED
// A treatment's matrices go wherever the page arrays go, after them.
#define AFTER_SOURCE_PARAMETER , BUFFER treatment
#define AFTER_SOURCE_ARGUMENT , treatment
#define AFTER_ON_SOURCE
#endif
