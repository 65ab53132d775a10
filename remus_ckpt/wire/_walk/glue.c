/* remus_ckpt.wire._path: the walks over a whole checkpoint, a receive that waits, pages to a file, and page records of
 * QEMU, as Python functions.
 *
 * Only the stable ABI of Python 3.11 is used; what takes longer than a call runs without the GIL.
 */
#define _GNU_SOURCE /* sync_file_range */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ram.h"
#include "walk.h"

static int count_is(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given != wanted)
        PyErr_Format(PyExc_TypeError, "%zd arguments are given where %zd are taken", given, wanted);
    return given == wanted;
}

static void release(Py_buffer *buffers, int n)
{
    for (int i = 0; i < n; i++)
        PyBuffer_Release(buffers + i);
}

/* What of the arguments all walks have: `PFNS` and `CHUNKS` are int64[n] and int64[3 n]. */
enum { BYTES, PFNS, CHUNKS, STATE, BUFFERS };

static int expect(PyObject *const *args, Py_buffer *v, remus_expected *expected)
{
    const long word = PyLong_AsLong(args[1]);
    expected->word = (int)word;
    expected->p2m_size = PyLong_AsUnsignedLongLong(args[2]);
    expected->most_data = PyLong_AsUnsignedLongLong(args[3]);
    if (PyErr_Occurred())
        return 0;
    if ((word != 4 && word != 8) || expected->p2m_size > (uint64_t)1 << 40 || !expected->p2m_size) {
        PyErr_Format(PyExc_ValueError, "a word of %ld, or pages out of range", word);
        return 0;
    }
    if (PyObject_GetBuffer(args[0], &v[BYTES], PyBUF_SIMPLE) || PyObject_GetBuffer(args[4], &v[PFNS], PyBUF_WRITABLE)
        || PyObject_GetBuffer(args[5], &v[CHUNKS], PyBUF_WRITABLE))
        return 0;
    if ((uintptr_t)v[PFNS].buf % sizeof(int64_t) || (uintptr_t)v[CHUNKS].buf % sizeof(int64_t)) {
        PyErr_SetString(PyExc_ValueError, "pfns and chunks must be aligned");
        return 0;
    }
    expected->pfns = v[PFNS].buf;
    expected->pfn_room = (size_t)v[PFNS].len / sizeof(int64_t);
    expected->chunks = v[CHUNKS].buf;
    expected->chunk_room = (size_t)v[CHUNKS].len / (3 * sizeof(int64_t));
    return 1;
}

/* [(offset, bytes, pages), ...] */
static PyObject *chunks_of(const int64_t *chunks, size_t count)
{
    PyObject *const list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list && i < count; i++, chunks += 3) {
        PyObject *const one = Py_BuildValue("(LLL)", (long long)chunks[0], (long long)chunks[1], (long long)chunks[2]);
        if (!one || PyList_SetItem(list, (Py_ssize_t)i, one)) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

/* (stream's offset and size, end, epoch, digest before, digest after, time or None, codec is delta, digest is blake3,
 * device state, memory bytes, batches, tail, record, pfns as int64s, chunks) */
static PyObject *told(const remus_checkpoint *found, const remus_expected *rooms)
{
    PyObject *const chunks = chunks_of(rooms->chunks, found->walked.chunks), *time_ns = Py_None;
    if (!chunks)
        return NULL;
    if (found->has_time)
        time_ns = PyLong_FromUnsignedLongLong(found->time_ns);
    else
        Py_INCREF(Py_None);
    return Py_BuildValue("(nnnKy#y#NNNy#Knnny#N)", (Py_ssize_t)found->data, (Py_ssize_t)found->data_size,
                         (Py_ssize_t)found->end, (unsigned long long)found->epoch, found->before,
                         (Py_ssize_t)REMUS_DIGEST, found->after, (Py_ssize_t)REMUS_DIGEST, time_ns,
                         PyBool_FromLong(found->is_delta), PyBool_FromLong(found->is_blake3), found->device_state,
                         (Py_ssize_t)found->device_state_size, (unsigned long long)found->memory_bytes,
                         (Py_ssize_t)found->walked.batches, (Py_ssize_t)found->tail, (Py_ssize_t)found->record,
                         (const char *)rooms->pfns, (Py_ssize_t)(found->walked.pages * sizeof(int64_t)), chunks);
}

/* walk(data, word, p2m_size, most_data, pfns, chunks, has_checksums) -> None, or what `told` tells */
static PyObject *walk(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    remus_expected expected = {0};
    remus_checkpoint found;
    (void)self;
    memset(v, 0, sizeof v);
    if (!count_is(nargs, 7) || (expected.has_checksums = PyObject_IsTrue(args[6])) < 0)
        return NULL;
    if (expect(args, v, &expected)) {
        if (remus_walk(v[BYTES].buf, (size_t)v[BYTES].len, &expected, &found))
            result = told(&found, &expected);
        else
            result = Py_NewRef(Py_None);
    }
    release(v, BUFFERS);
    return result;
}

/* stream(data, word, p2m_size, most_data, pfns, chunks, state) -> None, False if more must come, or what `told` tells;
 * state: uint8[STATE_BYTES], zeros at the beginning */
static PyObject *stream(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    remus_expected expected = {0};
    remus_progress walked;
    remus_checkpoint found;
    int how = REMUS_NONE;
    (void)self;
    memset(v, 0, sizeof v);
    if (!count_is(nargs, 7) || !expect(args, v, &expected) || PyObject_GetBuffer(args[6], &v[STATE], PyBUF_WRITABLE))
        goto done;
    if ((size_t)v[STATE].len != sizeof walked) {
        PyErr_Format(PyExc_ValueError, "the state has %zu bytes", sizeof walked);
        goto done;
    }
    memcpy(&walked, v[STATE].buf, sizeof walked);
    if (walked.place > (size_t)v[BYTES].len || walked.pages > expected.pfn_room || walked.encoded > walked.pages
        || walked.chunks > expected.chunk_room) {
        PyErr_SetString(PyExc_ValueError, "the state is of other bytes");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    how = remus_stream(v[BYTES].buf, (size_t)v[BYTES].len, &expected, &walked, &found);
    Py_END_ALLOW_THREADS
    memcpy(v[STATE].buf, &walked, sizeof walked);
    if (how == REMUS_WHOLE)
        result = told(&found, &expected);
    else
        result = Py_NewRef(how == REMUS_MORE ? Py_False : Py_None);
done:
    release(v, BUFFERS);
    return result;
}

/* ack(data) -> None, or (epoch, digest, size) of an ACK frame for a durable checkpoint in its plain form */
static PyObject *ack(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer data;
    uint64_t epoch;
    const uint8_t *digest;
    PyObject *result = NULL;
    (void)self;
    if (!count_is(nargs, 1) || PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE))
        return NULL;
    const size_t size = remus_durable(data.buf, (size_t)data.len, &epoch, &digest);
    if (size)
        result = Py_BuildValue("(Ky#n)", (unsigned long long)epoch, digest, (Py_ssize_t)REMUS_DIGEST, (Py_ssize_t)size);
    else
        result = Py_NewRef(Py_None);
    PyBuffer_Release(&data);
    return result;
}

static int digests(PyObject *const *args, Py_buffer *v, int n)
{
    for (int i = 0; i < n; i++) {
        if (PyObject_GetBuffer(args[i], &v[i], PyBUF_SIMPLE))
            return 0;
        if (v[i].len != REMUS_DIGEST) {
            PyErr_Format(PyExc_ValueError, "a digest of %zd bytes", v[i].len);
            return 0;
        }
    }
    return 1;
}

/* end_frames(after, before, epoch, size, crc, stream_bytes, pages) -> bytes: the header of a DATA frame and, behind it, a
 * COMMIT frame; after, before: digests; epoch: that of after, at least 1 */
static PyObject *end_frames(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer v[2];
    uint8_t out[REMUS_FRAMES];
    unsigned long long numbers[5];
    PyObject *result = NULL;
    (void)self;
    if (!count_is(nargs, 7))
        return NULL;
    for (int i = 0; i < 5; i++)
        numbers[i] = PyLong_AsUnsignedLongLong(args[2 + i]);
    if (PyErr_Occurred())
        return NULL;
    memset(v, 0, sizeof v);
    if (!digests(args, v, 2))
        goto done;
    if (!numbers[0] || numbers[0] >> 63 || numbers[1] > UINT32_MAX || numbers[2] > UINT32_MAX || numbers[3] >> 63
        || numbers[4] >> 63) {
        PyErr_SetString(PyExc_ValueError, "numbers out of range");
        goto done;
    }
    const size_t size = remus_compose_end(out, (uint32_t)numbers[1], (uint32_t)numbers[2], numbers[0], v[0].buf,
                                          v[1].buf, numbers[3], numbers[4]);
    result = PyBytes_FromStringAndSize((const char *)out, (Py_ssize_t)size);
done:
    release(v, 2);
    return result;
}

/* ack_frame(digest, epoch) -> bytes: an ACK frame for a durable checkpoint */
static PyObject *ack_frame(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer digest;
    uint8_t out[REMUS_FRAMES];
    PyObject *result = NULL;
    (void)self;
    if (!count_is(nargs, 2))
        return NULL;
    const unsigned long long epoch = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    memset(&digest, 0, sizeof digest);
    if (digests(args, &digest, 1)) {
        const size_t size = remus_compose_durable(out, epoch, digest.buf);
        result = PyBytes_FromStringAndSize((const char *)out, (Py_ssize_t)size);
    }
    release(&digest, 1);
    return result;
}

/* write(fd, data, at): write all of it at the file's own offset, which is `at`, and have the kernel begin to write it to
 * the disk, which it may refuse. Raises OSError; some of it may have been written then. */
static PyObject *write_early(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer data;
    (void)self;
    if (!count_is(nargs, 3))
        return NULL;
    const long fd = PyLong_AsLong(args[0]);
    const long long at = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE))
        return NULL;
    const uint8_t *next = data.buf;
    size_t left = (size_t)data.len;
    int error = 0;
    while (left && !error) {
        Py_BEGIN_ALLOW_THREADS
        while (left && !error) {
            const ssize_t size = write((int)fd, next, left);
            if (size < 0) {
                error = errno;
            } else {
                next += size;
                left -= (size_t)size;
            }
        }
        if (!error)
            sync_file_range((int)fd, at, data.len, SYNC_FILE_RANGE_WRITE);
        Py_END_ALLOW_THREADS
        if (error == EINTR) {
            if (PyErr_CheckSignals())
                break;
            error = 0;
        }
    }
    PyBuffer_Release(&data);
    if (error && error != EINTR) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return error ? NULL : Py_NewRef(Py_None);
}

/* write_pages(fd, data, index, numbers, at): page index[i] of data, of 4,096 bytes each, to `at` and numbers[i] pages in
 * the file; pages that follow each other in both are one write. index, numbers: int64[n]. Raises OSError; some may have
 * been written then. */
static PyObject *write_pages(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { DATA, INDEX, NUMBERS, BUFFERS, PAGE = 4096 };
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    (void)self;
    memset(v, 0, sizeof v);
    if (!count_is(nargs, 5))
        return NULL;
    const long fd = PyLong_AsLong(args[0]);
    const long long at = PyLong_AsLongLong(args[4]);
    if (PyErr_Occurred())
        return NULL;
    for (int i = 0; i < BUFFERS; i++)
        if (PyObject_GetBuffer(args[1 + i], &v[i], PyBUF_SIMPLE))
            goto done;
    const uint8_t *const data = v[DATA].buf;
    const int64_t *const index = v[INDEX].buf, *const numbers = v[NUMBERS].buf;
    const size_t count = (size_t)v[INDEX].len / sizeof *index;
    int fits = v[INDEX].len == v[NUMBERS].len && at >= 0 && !((uintptr_t)index % sizeof *index)
               && !((uintptr_t)numbers % sizeof *numbers);
    for (size_t i = 0; fits && i < count; i++)
        fits = index[i] >= 0 && index[i] < v[DATA].len / PAGE && numbers[i] >= 0
               && numbers[i] <= (INT64_MAX - at) / PAGE - 1;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "pages or places out of range");
        goto done;
    }
    size_t first = 0, written = 0; /* of the run at `first`, bytes */
    int error = 0;
    while (first < count && !error) {
        Py_BEGIN_ALLOW_THREADS
        while (first < count && !error) {
            size_t stop = first + 1;
            while (stop < count && index[stop] == index[stop - 1] + 1 && numbers[stop] == numbers[stop - 1] + 1)
                stop++;
            const ssize_t size = pwrite((int)fd, data + index[first] * PAGE + written, (stop - first) * PAGE - written,
                                        at + numbers[first] * PAGE + (off_t)written);
            if (size <= 0) {
                error = size ? errno : EIO;
            } else if ((written += (size_t)size) == (stop - first) * PAGE) {
                first = stop;
                written = 0;
            }
        }
        Py_END_ALLOW_THREADS
        if (error == EINTR) {
            if (PyErr_CheckSignals())
                goto done;
            error = 0;
        }
    }
    if (error) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        result = Py_NewRef(Py_None);
    }
done:
    release(v, BUFFERS);
    return result;
}

/* wanted(data, most_data) -> bytes that must be there before a whole checkpoint can be; 0 if none begins here */
static PyObject *wanted(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer data;
    (void)self;
    if (!count_is(nargs, 2))
        return NULL;
    const unsigned long long most = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE))
        return NULL;
    const size_t size = remus_wanted(data.buf, (size_t)data.len, most);
    PyBuffer_Release(&data);
    return PyLong_FromSize_t(size);
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* receive(fd, room, timeout_ms) -> bytes received, at least one; 0 at the end of the stream, -1 if the time runs out.
 * fd: of a socket that does not block; timeout_ms: of the wait for the first byte, negative for none.
 * A signal that comes meanwhile is handled, and the wait goes on. Raises OSError. */
static PyObject *receive(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer room;
    (void)self;
    if (!count_is(nargs, 3))
        return NULL;
    const long fd = PyLong_AsLong(args[0]);
    const long long timeout_ms = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &room, PyBUF_WRITABLE))
        return NULL;
    const int64_t deadline = timeout_ms < 0 ? -1 : now_ms() + timeout_ms;
    ssize_t size;
    int error, is_late = 0;
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        for (;;) {
            size = recv((int)fd, room.buf, (size_t)room.len, MSG_DONTWAIT);
            error = errno;
            if (size >= 0 || (error != EAGAIN && error != EWOULDBLOCK))
                break;
            const int64_t left = deadline < 0 ? -1 : deadline - now_ms();
            struct pollfd one = {.fd = (int)fd, .events = POLLIN};
            if ((is_late = deadline >= 0 && left <= 0))
                break;
            if (poll(&one, 1, left > 1 << 30 ? 1 << 30 : (int)left) < 0) {
                error = errno;
                break;
            }
        }
        Py_END_ALLOW_THREADS
        if (size >= 0 || is_late || error != EINTR)
            break;
        if (PyErr_CheckSignals()) {
            PyBuffer_Release(&room);
            return NULL;
        }
    }
    PyBuffer_Release(&room);
    if (is_late)
        return PyLong_FromLong(-1);
    if (size < 0) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSsize_t(size);
}

/* scan(data, page_size, block_size, name, full, places, zero, fills, encoded, frame_at, frames) -> (bytes that the records
 * take, whole pages, filled ones, encoded ones, bytes of their frames); full, places, zero, encoded, frame_at: int64[n] */
static PyObject *scan(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    enum { DATA, NAME, FULL, PLACES, ZERO, FILLS, ENCODED, FRAME_AT, FRAMES, BUFFERS };
    static const int places[] = {0, 3, 4, 5, 6, 7, 8, 9, 10};
    Py_buffer v[BUFFERS];
    PyObject *result = NULL;
    size_t room = SIZE_MAX;
    (void)self;
    memset(v, 0, sizeof v);
    if (!count_is(nargs, 11))
        return NULL;
    const unsigned long long page_size = PyLong_AsUnsignedLongLong(args[1]);
    const unsigned long long block_size = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    for (int i = 0; i < BUFFERS; i++) {
        if (PyObject_GetBuffer(args[places[i]], &v[i], i > NAME ? PyBUF_WRITABLE : PyBUF_SIMPLE))
            goto done;
        if (i > NAME && i < FRAMES) {
            const size_t item = i == FILLS ? 1 : sizeof(int64_t), count = (size_t)v[i].len / item;
            room = count < room ? count : room;
            if ((uintptr_t)v[i].buf % item)
                room = 0;
        }
    }
    if (page_size < 1024 || page_size & (page_size - 1) || block_size > (unsigned long long)INT64_MAX
        || v[FRAMES].len < v[DATA].len || v[NAME].len > 255 || !room) {
        PyErr_SetString(PyExc_ValueError, "rooms too small or not aligned, or sizes out of range");
        goto done;
    }
    const remus_block block = {page_size,      block_size,   v[NAME].buf,  (size_t)v[NAME].len, room,
                               v[FULL].buf,    v[PLACES].buf, v[ZERO].buf,  v[FILLS].buf,        v[ENCODED].buf,
                               v[FRAME_AT].buf, v[FRAMES].buf};
    remus_found found;
    size_t taken;
    Py_BEGIN_ALLOW_THREADS
    taken = remus_scan_ram(v[DATA].buf, (size_t)v[DATA].len, &block, &found);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("(nnnnn)", (Py_ssize_t)taken, (Py_ssize_t)found.full, (Py_ssize_t)found.zero,
                           (Py_ssize_t)found.encoded, (Py_ssize_t)found.frames);
done:
    release(v, BUFFERS);
    return result;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))(name), METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    FUNCTION(walk),       FUNCTION(stream),    FUNCTION(wanted), FUNCTION(ack),           FUNCTION(end_frames),
    FUNCTION(ack_frame),  FUNCTION(write_early), FUNCTION(receive), FUNCTION(scan),         FUNCTION(write_pages),
    {NULL, NULL, 0, NULL}};

static int add_constants(PyObject *module)
{
    return PyModule_AddIntConstant(module, "STATE_BYTES", sizeof(remus_progress))
           || PyModule_AddStringConstant(module, "SOURCES", REMUS_SOURCES);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_constants}, {0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_path", "The native path of a checkpoint; see whole.py.", 0, functions, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__path(void)
{
    return PyModuleDef_Init(&module);
}
