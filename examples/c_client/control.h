/* As much of the control protocol as client.c needs: messages in msgpack (shmbroker/control/messages.py tells them all), on a unix socket that speaks ZMTP.
 *
 * One thread, one question at a time: `ask` writes it into a buffer of this file, and returns where its answer's fields lie in another, until the next. What
 * cannot be read, is refused, or does not come within SECONDS ends the process with one line.
 */
#ifndef CONTROL_H
#define CONTROL_H

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    PROTOCOL_VERSION = 5,
    MOST_BYTES = 1 << 20, /* of a message */
    TEXT = 1024,          /* room for a text of one, with its 0; a longer one is cut */
    MOST_TEXT = 255,      /* of one that is sent */
    SECONDS = 30,         /* that an answer may take */
};

static uint8_t question[MOST_BYTES], answer[MOST_BYTES], *question_end;
static const uint8_t *answer_end;

/* Say why, in one line, and end: the kernel ends this process's holds, and the broker unlinks what nobody holds. */
static _Noreturn void fail(const char *format, ...)
{
    char text[2 * TEXT];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *at = text; (at = strchr(at, '\n')) != NULL;)
        *at = ' ';
    fprintf(stderr, "client: %s\n", text);
    exit(1);
}

/* --- control messages in msgpack: [version, number of the request, {"type": ..., field: value, ...}] ------------------------------------------ */

static void put_number(uint64_t number)
{
    *question_end++ = 0xcf;
    for (int shift = 56; shift >= 0; shift -= 8)
        *question_end++ = (uint8_t)(number >> shift);
}

static void put_text(const char *text)
{
    size_t count = strlen(text);
    if (count > MOST_TEXT)
        fail("%s is too long", text);
    *question_end++ = 0xd9;
    *question_end++ = (uint8_t)count;
    question_end = (uint8_t *)memcpy(question_end, text, count) + count;
}

/* As the broker and workers know a process (shmbroker/control/messages.py): a pid alone may be given again. */
static void put_process(void)
{
    static const int start_time = 20; /* of the fields of /proc/self/stat behind the command's bracket */
    char line[1024] = "", *field;
    struct stat namespace;
    FILE *file = fopen("/proc/self/stat", "r");
    if (file == NULL || fgets(line, sizeof line, file) == NULL || stat("/proc/self/ns/pid", &namespace) < 0)
        fail("/proc cannot be read");
    fclose(file);
    field = strrchr(line, ')');
    for (int i = 0; i < start_time; i++)
        field = strchr(field + 1, ' ');
    *question_end++ = 0x83;
    put_text("pid");
    put_number((uint64_t)getpid());
    put_text("start_time");
    put_number(strtoull(field, NULL, 10));
    put_text("namespace");
    put_number(namespace.st_ino);
}

/* What stands at *at: 'n'umber, 't'ext or bytes, 'a'rray, 'm'ap, or 'o'ther; its value or length in *count, and *at behind its head. */
static char head(const uint8_t **at, uint64_t *count)
{
    static const char kinds[] = "ooootttooooonnnnoooooooootttaamm"; /* of 0xc0 to 0xdf, and the bytes of their values or lengths */
    static const uint8_t sizes[] = {0, 0, 0, 0, 1, 2, 4, 0, 0, 0, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 0, 0, 0, 0, 0, 1, 2, 4, 2, 4, 2, 4};
    if (answer_end - *at < 9 && answer_end - *at < 1 + (**at >= 0xc0 && **at < 0xe0 ? sizes[**at - 0xc0] : 0))
        fail("a control message ends too early");
    uint8_t first = *(*at)++;
    *count = first & (first >= 0xa0 ? 0x1f : first >= 0x80 ? 0x0f : 0x7f);
    if (first < 0xc0 || first >= 0xe0)
        return first >= 0xe0 ? 'o' : first >= 0xa0 ? 't' : first >= 0x90 ? 'a' : first >= 0x80 ? 'm' : 'n';
    *count = 0;
    for (int left = sizes[first - 0xc0]; left > 0; left--)
        *count = *count << 8 | *(*at)++;
    return kinds[first - 0xc0];
}

/* Behind the value at `at`. */
static const uint8_t *skip(const uint8_t *at, int depth)
{
    uint64_t count;
    char kind = head(&at, &count);
    if (depth > 8 || (kind == 't' && count > (uint64_t)(answer_end - at)))
        fail("a control message cannot be read");
    if (kind == 't')
        return at + count;
    for (count = kind == 'm' ? 2 * count : kind == 'a' ? count : 0; count > 0; count--)
        at = skip(at, depth + 1);
    return at;
}

/* The value of `key` in the map at `at`, of this kind; its value or length in *count. A number ends where it begins: behind its head. */
static const uint8_t *find(const uint8_t *at, const char *key, char kind, uint64_t *count)
{
    uint64_t fields, length;
    if (head(&at, &fields) != 'm')
        fail("a control message has no map where %s was to be", key);
    for (; fields > 0; fields--) {
        const uint8_t *value = skip(at, 0), *behind = skip(value, 0);
        bool found = head(&at, &length) == 't' && length == strlen(key) && memcmp(at, key, length) == 0;
        at = found ? value : behind;
        if (found && head(&at, count) == kind)
            return at;
        if (found)
            break;
    }
    fail("a control message has no %s", key);
}

static uint64_t number_of(const uint8_t *map, const char *key)
{
    uint64_t number;
    find(map, key, 'n', &number);
    return number;
}

static void text_of(const uint8_t *map, const char *key, char text[TEXT])
{
    uint64_t count;
    const uint8_t *at = find(map, key, 't', &count);
    snprintf(text, TEXT, "%.*s", (int)(count < TEXT ? count : TEXT), (const char *)at);
}

/* --- the socket: ZMTP 3.0, mechanism NULL (https://rfc.zeromq.org/spec/23) -------------------------------------------------------------------- */

static void receive(int fd, void *bytes, size_t count)
{
    if (count && recv(fd, bytes, count, MSG_WAITALL) != (ssize_t)count)
        fail("whoever was asked has hung up, or does not answer within %d s", SECONDS);
}

/* The next frame, in `answer`; its flags. */
static unsigned receive_frame(int fd)
{
    uint8_t flags, length[8] = {0};
    uint64_t count = 0;
    receive(fd, &flags, 1);
    receive(fd, flags & 2 ? length : length + 7, flags & 2 ? 8 : 1);
    for (int i = 0; i < 8; i++)
        count = count << 8 | length[i];
    if (count > sizeof answer)
        fail("a control message of %" PRIu64 " bytes", count);
    receive(fd, answer, count);
    answer_end = answer + count;
    return flags;
}

static int connected(const char *path)
{
    static const char greeting[64] = "\xff\0\0\0\0\0\0\0\0\x7f\3\0NULL", ready[] = "\4\x29\5READY\13Socket-Type\0\0\0\6DEALER\10Identity\0\0\0";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = SECONDS};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("nobody listens at %s (%s): start a broker with 'shmbroker serve'", path, strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (send(fd, greeting, sizeof greeting, MSG_NOSIGNAL) < 0 || send(fd, ready, sizeof ready, MSG_NOSIGNAL) < 0)
        fail("%s hung up", path);
    receive(fd, answer, sizeof greeting);
    return fd;
}

/* Ask, and return the map of the answer, which has to be of type `wanted` (NULL: none is waited for). Fields come as pairs, and NULL at the end: their
 * names begin with what they are: 's' a text, 'n' a uint64_t, 'p' this process, 'e' an empty map, each followed by its value (0 for the last two). */
static const uint8_t *ask(int fd, const char *wanted, const char *type, ...)
{
    static uint64_t requests;
    char found[TEXT], kind[TEXT], why[TEXT];
    uint64_t count, version, request = 0;
    uint8_t frame[9] = {2};
    va_list fields;
    question_end = question;
    *question_end++ = 0x93;
    put_number(PROTOCOL_VERSION);
    put_number(++requests);
    uint8_t *map = question_end++;
    *map = 0x81;
    put_text("type");
    put_text(type);
    va_start(fields, type);
    for (const char *field; (field = va_arg(fields, const char *)) != NULL; ++*map) {
        put_text(field + 1);
        if (*field == 's')
            put_text(va_arg(fields, const char *));
        else if (*field == 'n')
            put_number(va_arg(fields, uint64_t));
        else if (va_arg(fields, int) == 0 && *field == 'p')
            put_process();
        else
            *question_end++ = 0x80;
    }
    va_end(fields);
    for (int i = 0; i < 8; i++)
        frame[1 + i] = (uint8_t)((uint64_t)(question_end - question) >> (56 - 8 * i));
    if (send(fd, frame, sizeof frame, MSG_NOSIGNAL) < 0 || send(fd, question, (size_t)(question_end - question), MSG_NOSIGNAL) < 0)
        fail("whoever was asked has hung up");
    const uint8_t *at = NULL;
    while (wanted != NULL && request != requests) { /* what has another number is news of others */
        while (receive_frame(fd) & 4)
            continue; /* READY, which tells nothing that is needed */
        at = answer;
        if (head(&at, &count) != 'a' || head(&at, &version) != 'n' || version != PROTOCOL_VERSION || head(&at, &request) != 'n')
            fail("whoever was asked does not speak version %d of the control protocol", PROTOCOL_VERSION);
    }
    if (wanted == NULL)
        return NULL;
    text_of(at, "type", found);
    if (strcmp(found, wanted) == 0)
        return at;
    if (strcmp(found, "Refused") != 0)
        fail("%s was answered with %s", type, found);
    text_of(at, "type_name", kind);
    text_of(at, "text", why);
    fail("%s: %s", kind, why);
}

#endif
