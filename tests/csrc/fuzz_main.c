/* Runs the fuzz target on random inputs, where libFuzzer is absent. Usage: fuzz SEED CASES. Case i
 * follows from SEED + i alone; a fault prints it, and "fuzz SEED+i 1" repeats it. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t running;

static void report(void) {
    fprintf(stderr, "repeat with: fuzz %llu 1\n", (unsigned long long)running);
}

#if defined(__SANITIZE_ADDRESS__)
void __sanitizer_set_death_callback(void (*callback)(void));
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "handle_abort=1:handle_sigill=1"; }
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) { return "abort_on_error=1"; }
static void report_death(void) { __sanitizer_set_death_callback(report); }
#else
#include <signal.h>
static void on_signal(int number) {
    report();
    signal(number, SIG_DFL);
    raise(number);
}
static void report_death(void) {
    signal(SIGABRT, on_signal);
    signal(SIGILL, on_signal);
    signal(SIGSEGV, on_signal);
}
#endif

/* splitmix64 */
static uint64_t next(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    const uint64_t seed = strtoull(argv[1], NULL, 10), cases = strtoull(argv[2], NULL, 10);
    report_death();
    for (uint64_t i = 0; i < cases; i++) {
        uint64_t words[64], state = running = seed + i;
        for (size_t e = 0; e < 64; e++) words[e] = next(&state);
        LLVMFuzzerTestOneInput((const uint8_t *)words, sizeof words);
    }
    printf("%llu cases\n", (unsigned long long)cases);
    return 0;
}
