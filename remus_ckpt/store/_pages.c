/* remus_ckpt.store._pages: pages of a checkpoint, found by the page index (specs/store.md, "The page index").
 *
 * read(...) fills a range of pages; serve(...) fills memory as it is touched. Both run without the GIL: a thread that
 * holds the GIL may itself be waiting for a page. Records, heads and the bytes of a segment come from files, and are
 * checked before they are used. Only the stable ABI of Python 3.11 is used.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../codec/_kernels/crc32c.h"
#include "../codec/_kernels/kernels.h"

#if REMUS_X86
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records are read in place, lowest byte first"
#endif

#define PAGE REMUS_PAGE
#define MAX_DEPTH 255 /* deltas on top of a full page */
#define BLOCK 128     /* pages read together: what is checked next is still in the cache */
#define FEW 16        /* pages filled on a touch, and ... */
#define MANY 256      /* ... where touches follow one another */
#define FILES 2
#define FILLED(p) (filled[(p) / 8] >> ((p) % 8) & 1)

#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14)
#endif
#ifndef UFFDIO_POISON
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

/* One form of one page. Numbers of records count from 1; 0 is none: zeros. */
typedef struct {
    uint64_t where; /* bits 0-47: offset; 48-55: deltas since the full form; 62-63: in which file */
    uint32_t pfn;
    uint32_t before; /* the form that this delta applies to */
    uint32_t crc;    /* of the other fields and the bytes */
    uint16_t length;
    uint16_t chain; /* bytes of deltas since the full form, with this one */
} record;

_Static_assert(sizeof(record) == 24, "the layout of the file");

#define OFFSET(r) ((r)->where & 0xffffffffffffULL)
#define DEPTH(r) ((unsigned)((r)->where >> 48) & 0xff)
#define FILE_OF(r) ((unsigned)((r)->where >> 62))

/* What is read from. */
typedef struct {
    int files[FILES]; /* the segment, and full pages beside the index */
    const record *records;
    size_t count;
    const uint32_t *heads;
    size_t pages;
    const uint8_t *held; /* bytes of the segment that are in memory, or NULL */
    uint64_t held_start, held_size;
    remus_codec codec;
} source;

enum { GOOD, UNREADABLE, CHANGED };

/* Checksums */

/* Of a whole page: the sum over its 64-bit words of (low half + key) x (high half + key), modulo 2^64, where both sums
 * are modulo 2^32 (NH, as in UMAC). A CRC takes an instruction for eight bytes, this one for 32 or 64. */
static uint64_t keys[PAGE / 8];

static void make_keys(void)
{
    uint64_t x = 0;
    for (size_t i = 0; i < PAGE / 8; i++) { /* splitmix64 */
        x += 0x9e3779b97f4a7c15u;
        uint64_t z = x;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        keys[i] = z ^ z >> 31;
    }
}

static uint64_t sum_plain(const uint8_t *page)
{
    uint64_t sum = 0, word;
    for (size_t i = 0; i < PAGE / 8; i++) {
        memcpy(&word, page + i * 8, 8);
        sum += (uint64_t)(uint32_t)(word + keys[i]) * (uint32_t)((word >> 32) + (keys[i] >> 32));
    }
    return sum;
}

static uint32_t (*crc_run)(uint32_t, const uint8_t *, size_t) = remus_crc_plain;
static uint64_t (*page_sum)(const uint8_t *) = sum_plain;

#if REMUS_X86
__attribute__((target("avx2"))) static uint64_t sum_avx2(const uint8_t *page)
{
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    const __m256i *words = (const __m256i *)page, *with = (const __m256i *)keys;
    for (size_t i = 0; i < PAGE / 32; i += 2)
        for (size_t j = 0; j < 2; j++) {
            const __m256i x = _mm256_add_epi32(_mm256_loadu_si256(words + i + j), _mm256_loadu_si256(with + i + j));
            sums[j] = _mm256_add_epi64(sums[j], _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
        }
    uint64_t each[4];
    _mm256_storeu_si256((__m256i *)each, _mm256_add_epi64(sums[0], sums[1]));
    return each[0] + each[1] + each[2] + each[3];
}

__attribute__((target("avx512f"))) static uint64_t sum_avx512(const uint8_t *page)
{
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (size_t i = 0; i < PAGE; i += 128)
        for (size_t j = 0; j < 2; j++) {
            const __m512i x = _mm512_add_epi32(_mm512_loadu_si512(page + i + j * 64),
                                               _mm512_loadu_si512((const uint8_t *)keys + i + j * 64));
            sums[j] = _mm512_add_epi64(sums[j], _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32)));
        }
    uint64_t each[8], sum = 0;
    _mm512_storeu_si512(each, _mm512_add_epi64(sums[0], sums[1]));
    for (size_t i = 0; i < 8; i++)
        sum += each[i];
    return sum;
}
#endif

static void choose_sums(void)
{
    make_keys();
    /* The same variable that chooses the kernel of the codecs; all of these give the same sums. */
    const char *wanted = getenv("REMUS_CKPT_KERNEL");
    const int is_scalar = wanted && !strcmp(wanted, "scalar");
    if (REMUS_CRC_RUNS() && !is_scalar)
        crc_run = remus_crc_fast;
#if REMUS_X86
    const int is_avx2 = wanted && !strcmp(wanted, "avx2");
    if (REMUS_CPU_HAS(avx512f) && !is_scalar && !is_avx2)
        page_sum = sum_avx512;
    else if (REMUS_CPU_HAS(avx2) && !is_scalar)
        page_sum = sum_avx2;
#endif
}

static uint32_t crc_of(const record *r, const uint8_t *data)
{
    uint8_t head[20];
    memcpy(head, r, 16);
    memcpy(head + 16, &r->length, 4);
    uint32_t c = crc_run(~0u, head, sizeof head);
    if (r->length == PAGE) {
        const uint64_t sum = page_sum(data);
        c = crc_run(c, (const uint8_t *)&sum, sizeof sum);
    } else {
        c = crc_run(c, data, r->length);
    }
    return ~c;
}

/* Reading */

static int read_at(int fd, uint8_t *out, size_t size, uint64_t at)
{
    while (size) {
        const ssize_t got = pread(fd, out, size, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            if (!got)
                errno = 0;
            return UNREADABLE;
        }
        out += got, size -= (size_t)got, at += (uint64_t)got;
    }
    return GOOD;
}

/* The record of that number if it can be one of this page, or NULL. */
static const record *record_of(const source *s, uint32_t number, size_t page)
{
    if (!number || number > s->count)
        return NULL;
    const record *r = s->records + number - 1;
    if (r->pfn != page || FILE_OF(r) >= FILES || s->files[FILE_OF(r)] < 0)
        return NULL;
    return DEPTH(r) || r->length == PAGE ? r : NULL;
}

/* The full form under a page; *full is NULL where that is zeros. */
static int find_full(const source *s, size_t page, const record **full)
{
    uint32_t number = s->heads[page];
    *full = NULL;
    unsigned above = MAX_DEPTH + 1;
    while (number) {
        const record *r = record_of(s, number, page);
        if (!r || DEPTH(r) >= above)
            return CHANGED;
        if (!DEPTH(r)) {
            *full = r;
            return GOOD;
        }
        if (r->before >= number)
            return CHANGED;
        above = DEPTH(r);
        number = r->before;
    }
    return GOOD;
}

/* Applies the deltas of a page, whose full form is in out; find_full has followed the same way. */
static int apply_deltas(const source *s, size_t page, uint8_t *out)
{
    uint32_t numbers[MAX_DEPTH + 1];
    unsigned n = 0;
    for (uint32_t number = s->heads[page]; number; number = s->records[number - 1].before) {
        if (!DEPTH(s->records + number - 1))
            break;
        numbers[n++] = number;
    }
    while (n) {
        uint8_t buffer[PAGE + 64];
        const record *r = s->records + numbers[--n] - 1;
        const uint64_t at = OFFSET(r);
        const uint8_t *data = buffer;
        if (r->length > PAGE + 32)
            return CHANGED;
        if (s->held && !FILE_OF(r) && at >= s->held_start && at + r->length <= s->held_start + s->held_size) {
            data = s->held + (at - s->held_start);
        } else {
            const int result = read_at(s->files[FILE_OF(r)], buffer, r->length, at);
            if (result)
                return result;
        }
        if (crc_of(r, data) != r->crc || s->codec.check(data, r->length, 1) != r->length)
            return CHANGED;
        s->codec.apply(data, r->length, out, NULL, 1);
    }
    return GOOD;
}

/* Fills out with n pages from `first` on; *bad is the page at fault where the result is not GOOD. */
static int read_block(const source *s, size_t first, size_t n, uint8_t *out, size_t *bad)
{
    const record *full[BLOCK];
    int result = GOOD;
    for (size_t i = 0; i < n; i++) {
        *bad = first + i;
        if ((result = find_full(s, first + i, &full[i])))
            return result;
    }
    for (size_t i = 0; i < n;) {
        size_t stop = i + 1;
        *bad = first + i;
        if (!full[i]) {
            memset(out + i * PAGE, 0, PAGE);
        } else {
            while (stop < n && full[stop] && full[stop]->where == full[i]->where + (stop - i) * PAGE)
                stop++;
            result = read_at(s->files[FILE_OF(full[i])], out + i * PAGE, (stop - i) * PAGE, OFFSET(full[i]));
            if (result)
                return result;
            for (size_t j = i; j < stop; j++) {
                *bad = first + j;
                if (crc_of(full[j], out + j * PAGE) != full[j]->crc)
                    return CHANGED;
            }
        }
        for (size_t j = i; j < stop; j++) {
            *bad = first + j;
            if ((result = apply_deltas(s, first + j, out + j * PAGE)))
                return result;
        }
        i = stop;
    }
    return GOOD;
}

/* Python's side */

enum { RECORDS, HEADS, HELD, OUT, BUFFERS };

/* (files, records, heads, held, held_start, codec, kernel) -> source */
static int take_source(PyObject *tuple, source *s, Py_buffer v[BUFFERS])
{
    PyObject *records, *heads, *held;
    unsigned long long held_start;
    int codec;
    const char *kernel;
    memset(s, 0, sizeof *s);
    if (!PyArg_ParseTuple(tuple, "(ii)OOOKis", &s->files[0], &s->files[1], &records, &heads, &held,
                          &held_start, &codec, &kernel))
        return -1;
    if (PyObject_GetBuffer(records, &v[RECORDS], PyBUF_SIMPLE) || PyObject_GetBuffer(heads, &v[HEADS], PyBUF_SIMPLE)
        || (held != Py_None && PyObject_GetBuffer(held, &v[HELD], PyBUF_SIMPLE)))
        return -1;
    s->records = v[RECORDS].buf, s->count = (size_t)v[RECORDS].len / sizeof(record);
    s->heads = v[HEADS].buf, s->pages = (size_t)v[HEADS].len / 4;
    s->held = v[HELD].buf, s->held_start = held_start, s->held_size = (uint64_t)v[HELD].len;
    for (const remus_kernel *const *k = remus_kernels; *k; k++)
        if (!strcmp((*k)->name, kernel) && (*k)->runs() && codec >= 0 && codec < REMUS_CODECS) {
            s->codec = (*k)->codecs[codec];
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "no codec %d of a kernel %s", codec, kernel);
    return -1;
}

static void release(Py_buffer *v)
{
    for (int i = 0; i < BUFFERS; i++)
        PyBuffer_Release(v + i);
}

/* read(source, first, out) -> None, or (page, errno) of a page that cannot be read; errno -1: its bytes have changed */
static PyObject *py_read(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *tuple, *out, *answer = NULL;
    Py_ssize_t first;
    source s;
    Py_buffer v[BUFFERS];
    memset(v, 0, sizeof v);
    if (!PyArg_ParseTuple(args, "OnO", &tuple, &first, &out))
        return NULL;
    if (take_source(tuple, &s, v) || PyObject_GetBuffer(out, &v[OUT], PyBUF_WRITABLE))
        goto done;
    const size_t n = (size_t)v[OUT].len / PAGE;
    if (first < 0 || (size_t)first > s.pages || n > s.pages - (size_t)first) {
        PyErr_Format(PyExc_ValueError, "pages %zd and %zu after it, of %zu", first, n, s.pages);
        goto done;
    }
    int result = GOOD, error = 0;
    size_t bad = 0;
    Py_BEGIN_ALLOW_THREADS
    for (size_t at = 0; at < n && !result; at += BLOCK)
        result = read_block(&s, (size_t)first + at, n - at < BLOCK ? n - at : BLOCK, (uint8_t *)v[OUT].buf + at * PAGE,
                            &bad);
    error = result == CHANGED ? -1 : errno;
    Py_END_ALLOW_THREADS
    answer = result ? Py_BuildValue("ni", (Py_ssize_t)bad, error) : Py_NewRef(Py_None);
done:
    release(v);
    return answer;
}

/* seal(records, data, at): the checksums of records, the bytes of which begin at int64 at[i] in data */
static PyObject *py_seal(PyObject *module, PyObject *args)
{
    (void)module;
    enum { EACH, DATA, AT, ALL };
    PyObject *objects[ALL];
    Py_buffer v[ALL];
    memset(v, 0, sizeof v);
    if (!PyArg_ParseTuple(args, "OOO", &objects[EACH], &objects[DATA], &objects[AT]))
        return NULL;
    int fits = 1;
    for (int i = 0; i < ALL && fits; i++)
        fits = !PyObject_GetBuffer(objects[i], v + i, i == EACH ? PyBUF_WRITABLE : PyBUF_SIMPLE);
    if (fits) {
        record *each = v[EACH].buf;
        const int64_t *at = v[AT].buf;
        const size_t n = (size_t)v[EACH].len / sizeof(record);
        fits = (size_t)v[AT].len / 8 == n;
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < n && fits; i++) {
            fits = at[i] >= 0 && at[i] <= v[DATA].len && each[i].length <= v[DATA].len - at[i];
            if (fits)
                each[i].crc = crc_of(each + i, (const uint8_t *)v[DATA].buf + at[i]);
        }
        Py_END_ALLOW_THREADS
        if (!fits)
            PyErr_SetString(PyExc_ValueError, "a record lies beyond the bytes");
    }
    for (int i = 0; i < ALL; i++)
        PyBuffer_Release(v + i);
    return fits ? Py_NewRef(Py_None) : NULL;
}

/* borders(codec, encoded, out): the first byte of each of len(out) - 1 encoded pages, and of what follows them, into
 * int64 out; returns 0, or ~offset of a fault */
static PyObject *py_borders(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *encoded, *out;
    int codec;
    Py_buffer e, o;
    if (!PyArg_ParseTuple(args, "iOO", &codec, &encoded, &out))
        return NULL;
    if (codec < 0 || codec >= REMUS_CODECS) {
        PyErr_SetString(PyExc_ValueError, "no such codec");
        return NULL;
    }
    if (PyObject_GetBuffer(encoded, &e, PyBUF_SIMPLE))
        return NULL;
    if (PyObject_GetBuffer(out, &o, PyBUF_WRITABLE)) {
        PyBuffer_Release(&e);
        return NULL;
    }
    const remus_check_fn check = remus_kernels[0]->codecs[codec].check;
    int64_t *border = o.buf;
    const size_t n = (size_t)o.len / 8, size = (size_t)e.len;
    int64_t at = 0, taken = 0;
    Py_BEGIN_ALLOW_THREADS
    for (size_t i = 0; i < n; i++) {
        border[i] = at;
        if (i + 1 == n)
            break;
        taken = check((const uint8_t *)e.buf + at, size - (size_t)at, 1);
        if (taken < 0) {
            taken = ~(at + ~taken);
            break;
        }
        at += taken;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&e);
    PyBuffer_Release(&o);
    return PyLong_FromLongLong(taken < 0 ? taken : 0);
}

/* watch(address, size) -> a userfaultfd that is told when a missing page of this memory is touched. Raises OSError. */
static PyObject *py_watch(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long address, size;
    if (!PyArg_ParseTuple(args, "KK", &address, &size))
        return NULL;
    /* Pages must come for the kernel's own accesses too: an array may be given to write(2). */
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device >= 0) {
            fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
            close(device);
        } else {
            errno = EPERM;
        }
    }
    if (fd < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_POISON};
    struct uffdio_register range = {.range = {address, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range)) {
        PyErr_SetFromErrno(PyExc_OSError);
        close(fd);
        return NULL;
    }
    return PyLong_FromLong(fd);
}

static void poison(int fd, uint64_t at)
{
    struct uffdio_poison page = {.range = {at, PAGE}};
    /* Whoever touched it must not go on with anything else: as where the disk under a mapped file fails. */
    if (ioctl(fd, UFFDIO_POISON, &page) && errno != EEXIST)
        raise(SIGBUS);
}

static int copy_in(int fd, uint64_t at, const uint8_t *from, size_t size)
{
    struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)from, .len = size};
    while (ioctl(fd, UFFDIO_COPY, &copy)) {
        if (copy.copy > 0) {
            copy.dst += (uint64_t)copy.copy, copy.src += (uint64_t)copy.copy, copy.len -= (uint64_t)copy.copy;
        } else if (errno != EAGAIN) {
            return errno;
        }
        copy.copy = 0;
    }
    return 0;
}

/* serve(source, fd, stop, ready, address): fills pages as they are touched, until `stop` can be read.
 * ready: gets a byte once no GIL is held */
static PyObject *py_serve(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *tuple;
    int fd, stop, ready;
    unsigned long long address;
    source s;
    Py_buffer v[BUFFERS];
    memset(v, 0, sizeof v);
    if (!PyArg_ParseTuple(args, "OiiiK", &tuple, &fd, &stop, &ready, &address))
        return NULL;
    uint8_t *scratch = NULL, *filled = NULL;
    if (take_source(tuple, &s, v))
        goto done;
    scratch = aligned_alloc(PAGE, (size_t)MANY * PAGE);
    filled = calloc(s.pages / 8 + 1, 1);
    if (!scratch || !filled) {
        PyErr_NoMemory();
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    ssize_t wrote = write(ready, "r", 1);
    (void)wrote;
    size_t next = 0, span = FEW;
    for (;;) {
        struct pollfd both[2] = {{.fd = fd, .events = POLLIN}, {.fd = stop, .events = POLLIN}};
        struct uffd_msg message;
        if (poll(both, 2, -1) < 0)
            continue; /* to end here would leave the pages that are missing as zeros */
        if (both[1].revents)
            break;
        if (read(fd, &message, sizeof message) != sizeof message || message.event != UFFD_EVENT_PAGEFAULT)
            continue;
        const size_t page = (size_t)((message.arg.pagefault.address - address) / PAGE);
        if (page >= s.pages)
            continue;
        /* Touches that follow one another get more each time. A page that was filled before, and is missing again, was
         * thrown away by its owner: it gets just that one. */
        span = page == next ? (span * 2 < MANY ? span * 2 : MANY) : FEW;
        size_t first = page, end = page + 1;
        if (!FILLED(page)) {
            while (first % FEW && !FILLED(first - 1))
                first--;
            while (end < s.pages && end < page + span && end - first < MANY && (end % FEW || span > FEW) && !FILLED(end))
                end++;
        }
        next = end;
        size_t good = first, bad = 0;
        int result = GOOD;
        while (good < end) {
            const size_t n = end - good < BLOCK ? end - good : BLOCK;
            if ((result = read_block(&s, good, n, scratch + (good - first) * PAGE, &bad)))
                break;
            good += n;
        }
        if (result) {
            /* Only the page that was touched counts now; its neighbours are looked at when somebody wants them. */
            first = page, good = page + 1;
            if ((result = read_block(&s, page, 1, scratch, &bad))) {
                dprintf(STDERR_FILENO, "remus-ckpt: page %zu of a checkpoint cannot be read: %s; SIGBUS follows\n", page,
                        result == CHANGED ? "its bytes have changed" : errno ? strerror(errno) : "they are cut off");
                poison(fd, address + page * PAGE);
                continue;
            }
        }
        int failed = copy_in(fd, address + first * PAGE, scratch, (good - first) * PAGE);
        if (failed == EEXIST)
            for (size_t p = first; p < good; p++)
                failed = copy_in(fd, address + p * PAGE, scratch + (p - first) * PAGE, PAGE);
        for (size_t p = first; p < good; p++)
            filled[p / 8] |= (uint8_t)(1 << p % 8);
        struct uffdio_range range = {address + page * PAGE, PAGE};
        ioctl(fd, UFFDIO_WAKE, &range);
    }
    Py_END_ALLOW_THREADS
done:
    free(scratch);
    free(filled);
    release(v);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef functions[] = {
    {"read", py_read, METH_VARARGS, NULL},       {"seal", py_seal, METH_VARARGS, NULL},
    {"borders", py_borders, METH_VARARGS, NULL}, {"watch", py_watch, METH_VARARGS, NULL},
    {"serve", py_serve, METH_VARARGS, NULL},     {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "remus_ckpt.store._pages",
    .m_doc = "Pages of a checkpoint, found by the page index.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__pages(void);

PyMODINIT_FUNC __attribute__((visibility("default"))) PyInit__pages(void)
{
    PyObject *const module = PyModule_Create(&definition);
    choose_sums();
    if (module && PyModule_AddStringConstant(module, "SOURCES", REMUS_SOURCES)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
