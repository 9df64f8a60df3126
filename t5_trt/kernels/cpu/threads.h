// A team of threads that work on one step together: with barriers between its parts, or each on parts that it takes as it comes.
//
// Whoever waits looks for the event for some time and then sleeps: a thread that only looked would keep the processor from the one it
// waits for, as soon as other processes are busy too.
#pragma once
#define _GNU_SOURCE
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

// looks before a thread sleeps, where threads may wait busily and where they may not
enum { LOOKS_SPINNING = 1 << 11, LOOKS_BRIEF = 1 << 5 };
// See `wait_at_barrier`.
enum { IN_VAIN = 1 << 5, MOST_DOUBT = 7 * IN_VAIN, FIRST_BRIEF = 1 << 3 };

// A number that is counted up when something has happened.
typedef struct {
    _Atomic unsigned count;
    _Atomic int sleepers;
} Event;

// Wait until a count is not `seen` any more. Returns whether that took more than `looks` looks.
static int wait_for(Event *event, unsigned seen, int looks) {
    for (; looks; looks--) {
        if (atomic_load_explicit(&event->count, memory_order_acquire) != seen) return 0;
        PAUSE();
    }
    atomic_fetch_add(&event->sleepers, 1);
    while (atomic_load(&event->count) == seen) {
#if defined(__linux__)
        syscall(SYS_futex, &event->count, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&event->sleepers, 1);
    return 1;
}

static void announce(Event *event) {
    atomic_fetch_add(&event->count, 1);
#if defined(__linux__)
    if (atomic_load(&event->sleepers)) syscall(SYS_futex, &event->count, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
#endif
}

typedef struct Team Team;
typedef struct {
    Team *team;
    int index;
} Member;

struct Team {
    int count, looks;
    _Atomic int closing;
    _Atomic int users;      // whoever opened it, and decoders and encoders, in whatever order they end
    pid_t process;          // a fork has no threads but the one that called it
    pthread_mutex_t calls;  // one step at a time
    Event jobs;             // counted up when a job begins and when it ends: the count is odd while there is one
    Event phase, left;
    _Atomic int arrived, inside;  // at a barrier; threads that may run the job
    _Atomic int brief, doubt;     // see `wait_at_barrier`
    void (*run)(void *job, int index);
    void *job;
    Member *members;
    pthread_t *threads;
};

// Threads come to a barrier at nearly the same time. Where many looks are in vain again and again, other processes have the processor of the thread that is
// waited for, and each such wait keeps one from those. So the next waits sleep after few looks (`brief`), then many are tried again; each trial in vain
// doubles the number of brief waits. `doubt` forgets a single one within IN_VAIN waits.
static void wait_at_barrier(Team *team, unsigned phase) {
    int brief = atomic_load_explicit(&team->brief, memory_order_relaxed), doubt = atomic_load_explicit(&team->doubt, memory_order_relaxed);
    if (brief > 0) {
        atomic_store_explicit(&team->brief, brief - 1, memory_order_relaxed);
        wait_for(&team->phase, phase, LOOKS_BRIEF);
    } else if (wait_for(&team->phase, phase, team->looks)) {
        doubt = doubt < MOST_DOUBT ? doubt + IN_VAIN : MOST_DOUBT;
        atomic_store_explicit(&team->doubt, doubt, memory_order_relaxed);
        if (doubt > IN_VAIN) atomic_store_explicit(&team->brief, FIRST_BRIEF << doubt / IN_VAIN, memory_order_relaxed);
    } else if (doubt) atomic_store_explicit(&team->doubt, doubt - 1, memory_order_relaxed);
}

// Wait until all threads of the team are here.
static void barrier(Team *team) {
    if (team->count == 1) return;
    unsigned phase = atomic_load_explicit(&team->phase.count, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->count) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        announce(&team->phase);
    } else wait_at_barrier(team, phase);
}

static void *work(void *argument) {
    Member *member = argument;
    Team *team = member->team;
    for (unsigned known = 0;;) {
        wait_for(&team->jobs, known, team->looks);
        if (team->closing) return NULL;
        atomic_fetch_add(&team->inside, 1);  // before looking for the job: from now on its caller waits for this thread
        known = atomic_load(&team->jobs.count);
        if (known & 1) team->run(team->job, member->index);
        atomic_fetch_sub(&team->inside, 1);
        announce(&team->left);
    }
}

// Start the threads; how many there are is in `count` afterwards, fewer if the system refuses some.
static void open_team(Team *team, int count, int looks) {
    memset(team, 0, sizeof *team);
    team->looks = looks;
    team->process = getpid();
    pthread_mutex_init(&team->calls, NULL);
    team->members = calloc((size_t)count, sizeof *team->members);
    team->threads = calloc((size_t)count, sizeof *team->threads);
    team->count = 1;
    if (!team->members || !team->threads) return;
    for (int i = 1; i < count; i++) {
        team->members[i] = (Member){team, i};
        if (pthread_create(&team->threads[i], NULL, work, &team->members[i])) break;
        team->count = i + 1;
    }
}

static void close_team(Team *team) {
    if (team->process == getpid() && team->count > 1) {
        team->closing = 1;
        announce(&team->jobs);
        for (int i = 1; i < team->count; i++) pthread_join(team->threads[i], NULL);
    }
    free(team->members);
    free(team->threads);
}

// One call at a time may use a team and what belongs to it.
static void take_team(Team *team) {
    if (team->process != getpid()) {
        int users = team->users;
        open_team(team, team->count, team->looks);
        team->users = users;
    }
    pthread_mutex_lock(&team->calls);
}
static void give_team_back(Team *team) { pthread_mutex_unlock(&team->calls); }

// Run a job by the calling thread and those others that come before it has done its part. A job with barriers is run by all.
static void run_job(Team *team, void (*run)(void *, int), void *job) {
    team->run = run;
    team->job = job;
    if (team->count > 1) announce(&team->jobs);
    run(job, 0);
    if (team->count == 1) return;
    atomic_fetch_add(&team->jobs.count, 1);  // whoever comes now does not run it
    for (unsigned left; left = atomic_load(&team->left.count), atomic_load(&team->inside);) wait_for(&team->left, left, team->looks);
}
