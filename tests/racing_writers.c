/* Threads that write to memory at random places, for tests of tracking: a shared library. */
#include <pthread.h>
#include <stdint.h>
#include <stddef.h>

enum { MAX_THREADS = 16, WORDS = 512 };

struct share { volatile uint64_t *words; size_t pages; uint64_t writes, seed; };

static void *write_words(void *argument)
{
    struct share *share = argument;
    uint64_t x = share->seed;
    for (uint64_t n = 0; n < share->writes; n++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        share->words[(x >> 20) % (share->pages * WORDS)] = x;
    }
    return NULL;
}

/* `writes` writes in all by `threads` threads; returns when they are done. */
void race(uint64_t *words, size_t pages, int threads, uint64_t writes, uint64_t seed)
{
    pthread_t ids[MAX_THREADS];
    struct share shares[MAX_THREADS];
    for (int i = 0; i < threads && i < MAX_THREADS; i++) {
        shares[i] = (struct share){words, pages, writes / (uint64_t)threads, seed * MAX_THREADS + (uint64_t)i + 1};
        pthread_create(&ids[i], NULL, write_words, &shares[i]);
    }
    for (int i = 0; i < threads && i < MAX_THREADS; i++) pthread_join(ids[i], NULL);
}
