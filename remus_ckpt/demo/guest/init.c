/* The only program of a small guest: its process 1.
 *
 * It loads the drivers in /modules, brings eth0 up, and then
 *   - answers over TCP with records that a client can check byte by byte (../client.py has the other half),
 *   - dirties memory, and checks that each page holds what it wrote there,
 *   - writes numbered blocks with checksums to /dev/vda, if there is one, and checks them against its memory.
 *
 * The kernel's command line says how:
 *   guest.ip=A.B.C.D/LEN  guest.port=7000  guest.mib=16 (memory to dirty)  guest.pages=1000 (a second)
 *   guest.blocks=1024 (of 4 KiB, used of the disk)  guest.pause_us=1000 (between two writes to the disk)
 *
 * A datagram of a u32 to the port after guest.port brings so many datagrams of 1,000 bytes, as fast as the guest can;
 * each begins with its number, a u32 from 0.
 *
 * Request:  u32 size, u64 number, size bytes.
 * Answer:   struct answer, then `filler` bytes: `random` again and again.
 * All are little-endian. Nothing but fresh randomness makes two runs differ, so whoever has seen an answer that was
 * taken back will see it contradicted by the next.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_REQUEST = 65536, MAX_FILLER = 1400 };
static const uint32_t MAGIC = 0x53554d52;
static const uint64_t FNV_PRIME = 0x100000001b3u;

struct request {
    uint32_t size;
    uint64_t number;
} __attribute__((packed));

struct answer {
    uint32_t magic, filler;
    uint64_t counter; /* of this connection, from 1 */
    uint64_t number;  /* of the request */
    uint64_t random;
    uint64_t chain; /* FNV-1a over all `random` of this connection */
    uint32_t echo;  /* CRC-32 of all that has come over this connection */
    uint32_t faults;
    uint64_t pages, blocks; /* written so far */
} __attribute__((packed));

struct block {
    uint64_t index, number, random;
    uint8_t fill[PAGE - 32];
    uint32_t crc, zero; /* crc: of all before it */
};

static char command_line[4096];
static uint32_t crc_table[256];
static _Atomic uint32_t faults;
static _Atomic uint64_t pages_written, blocks_written;

static const char *option(const char *name, const char *otherwise)
{
    static char values[16][64];
    static int used;
    char wanted[64];
    snprintf(wanted, sizeof wanted, "guest.%s=", name);
    const char *at = strstr(command_line, wanted);
    if (!at)
        return otherwise;
    at += strlen(wanted);
    char *value = values[used++ % 16];
    snprintf(value, sizeof values[0], "%.*s", (int)strcspn(at, " \n"), at);
    return value;
}

static void fault(const char *what, uint64_t where)
{
    faults++;
    printf("fault: %s %llu\n", what, (unsigned long long)where);
}

static uint32_t crc32(uint32_t crc, const void *data, size_t size)
{
    crc = ~crc;
    for (const uint8_t *at = data; size--; at++)
        crc = crc_table[(crc ^ *at) & 255] ^ (crc >> 8);
    return ~crc;
}

static uint64_t fresh(void)
{
    uint64_t random;
    while (getrandom(&random, sizeof random, 0) != sizeof random)
        ;
    return random;
}

static void rest_us(long us)
{
    struct timespec rest = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&rest, NULL);
}

/* The service */

static int all(ssize_t (*move)(int, void *, size_t), int fd, void *data, size_t size)
{
    for (uint8_t *at = data; size;) {
        ssize_t some = move(fd, at, size);
        if (some <= 0)
            return 0;
        at += some;
        size -= (size_t)some;
    }
    return 1;
}

static ssize_t put(int fd, void *data, size_t size)
{
    return write(fd, data, size);
}

static void *serve(void *argument)
{
    int fd = (int)(intptr_t)argument;
    struct {
        struct answer answer;
        uint8_t filler[MAX_FILLER];
    } __attribute__((packed)) out = {.answer = {.magic = MAGIC, .chain = 0xcbf29ce484222325u}};
    struct answer *answer = &out.answer;
    static _Thread_local uint8_t data[MAX_REQUEST];
    struct request request;
    while (all(read, fd, &request, sizeof request) && request.size <= MAX_REQUEST &&
           all(read, fd, data, request.size)) {
        answer->counter++;
        answer->number = request.number;
        answer->random = fresh();
        for (int byte = 0; byte < 8; byte++)
            answer->chain = (answer->chain ^ (answer->random >> 8 * byte & 255)) * FNV_PRIME;
        answer->echo = crc32(answer->echo, &request, sizeof request);
        answer->echo = crc32(answer->echo, data, request.size);
        answer->filler = (uint32_t)(answer->random % MAX_FILLER);
        answer->faults = faults;
        answer->pages = pages_written;
        answer->blocks = blocks_written;
        for (uint32_t at = 0; at < answer->filler; at++)
            out.filler[at] = (uint8_t)(answer->random >> at % 8 * 8);
        if (!all(put, fd, &out, sizeof *answer + answer->filler))
            break;
    }
    close(fd);
    return NULL;
}

static void *listen_for_clients(void *argument)
{
    (void)argument;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(option("port", "7000")))};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 16))
        fault("listen", (uint64_t)errno);
    puts("guest is ready");
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        pthread_t thread;
        if (fd < 0)
            continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd);
        pthread_detach(thread);
    }
    return NULL;
}

static void *burst(void *argument)
{
    (void)argument;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)(atoi(option("port", "7000")) + 1))};
    struct sockaddr_in from;
    socklen_t length = sizeof from;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(fd, (struct sockaddr *)&here, sizeof here))
        fault("bind", (uint64_t)errno);
    for (uint32_t most, data[250] = {0}; recvfrom(fd, &most, sizeof most, 0, (struct sockaddr *)&from, &length) > 0;)
        for (data[0] = 0; data[0] < most; data[0]++)
            if (sendto(fd, data, sizeof data, 0, (struct sockaddr *)&from, length) != sizeof data)
                fault("send", data[0]);
    return NULL;
}

/* Memory */

static void *dirty(void *argument)
{
    (void)argument;
    uint64_t count = strtoull(option("mib", "16"), NULL, 10) * 256, rate = strtoull(option("pages", "1000"), NULL, 10);
    uint64_t *memory = NULL, *known = calloc(count + 1, sizeof *known);
    if (!count || !rate || posix_memalign((void **)&memory, PAGE, count * PAGE) || !known)
        return NULL;
    memset(memory, 0, count * PAGE);
    uint64_t done = 0, state = fresh() | 1;
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        double passed = (double)(now.tv_sec - start.tv_sec) + (double)(now.tv_nsec - start.tv_nsec) / 1e9;
        for (; (double)done < passed * (double)rate; done++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            uint64_t page = state % count, *words = memory + page * (PAGE / 8), word = state >> 32 & 511;
            if (words[0] != known[page] || words[511] != known[page])
                fault("page", page);
            words[word] = words[511] = words[0] = ++known[page];
            pages_written++;
        }
        rest_us(2000);
    }
    return NULL;
}

/* The disk */

static void *write_blocks(void *argument)
{
    (void)argument;
    int fd = open("/dev/vda", O_RDWR | O_DIRECT);
    if (fd < 0)
        return NULL;
    uint64_t count = strtoull(option("blocks", "1024"), NULL, 10), room = (uint64_t)lseek(fd, 0, SEEK_END) / PAGE;
    long pause_us = atol(option("pause_us", "1000"));
    struct block *block = NULL;
    if (posix_memalign((void **)&block, PAGE, PAGE))
        return NULL;
    struct head {
        uint64_t number, random;
        uint32_t crc;
    } *heads = calloc(count, sizeof *heads);
    count = count < room ? count : room;
    for (uint64_t number = 1; count; number++) {
        uint64_t index = fresh() % count;
        block->index = index;
        block->number = number;
        block->random = fresh();
        memset(block->fill, (int)(block->random & 255), sizeof block->fill);
        block->zero = 0;
        block->crc = crc32(0, block, offsetof(struct block, crc));
        struct head head = {number, block->random, block->crc};
        if (pwrite(fd, block, PAGE, (off_t)(index * PAGE)) != PAGE)
            fault("write of block", index);
        heads[index] = head;
        blocks_written++;
        if (number % 64 == 0)
            fdatasync(fd);
        index = fresh() % count;
        if (heads[index].number) {
            if (pread(fd, block, PAGE, (off_t)(index * PAGE)) != PAGE)
                fault("read of block", index);
            else if (block->index != index || block->number != heads[index].number || block->crc != heads[index].crc ||
                     block->crc != crc32(0, block, offsetof(struct block, crc)))
                fault("block", index);
        }
        rest_us(pause_us);
    }
    return NULL;
}

/* The start */

static void load_drivers(void)
{
    FILE *order = fopen("/modules/order", "r");
    char name[64], path[96];
    while (order && fscanf(order, "%63s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int fd = open(path, O_RDONLY);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
            printf("%s: %s\n", name, strerror(errno));
        close(fd);
    }
}

static void bring_up(void)
{
    char address[64];
    snprintf(address, sizeof address, "%s", option("ip", "10.83.9.2/24"));
    char *slash = strchr(address, '/');
    int length = slash ? atoi(slash + 1) : 24, fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (slash)
        *slash = 0;
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
    in->sin_family = AF_INET;
    inet_pton(AF_INET, address, &in->sin_addr);
    for (int tries = 0; ioctl(fd, SIOCSIFADDR, &request) && tries < 200; tries++)
        rest_us(10000);
    in->sin_addr.s_addr = htonl(length ? ~0u << (32 - length) : 0);
    ioctl(fd, SIOCSIFNETMASK, &request);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &request))
        puts("there is no eth0");
    close(fd);
}

int main(void)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) {
        dup2(console, 1);
        dup2(console, 2);
    }
    int fd = open("/proc/cmdline", O_RDONLY);
    if (read(fd, command_line, sizeof command_line - 1) < 0)
        puts("no command line");
    close(fd);
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
        crc_table[byte] = crc;
    }
    load_drivers();
    bring_up();
    void *(*work[])(void *) = {listen_for_clients, burst, dirty, write_blocks};
    for (size_t one = 0; one < sizeof work / sizeof *work; one++) {
        pthread_t thread;
        pthread_create(&thread, NULL, work[one], NULL);
    }
    for (;;)
        pause();
}
