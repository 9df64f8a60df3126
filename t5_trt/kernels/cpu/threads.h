// A team of threads that work on one step together, with barriers between its parts.
#pragma once
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

// looks at a barrier before the processor is offered to others, where threads may wait busily and where they may not
enum { LOOKS_SPINNING = 1 << 14, LOOKS_YIELDING = 64, LOOKS_FOR_WORK = 1 << 12 };

typedef struct Team Team;
typedef struct {
    Team *team;
    int index;
} Member;

struct Team {
    int count, looks, looks_for_work;
    pid_t process;  // a fork has no threads but the one that called it
    pthread_mutex_t calls;  // one step at a time
    pthread_mutex_t lock;
    pthread_cond_t work;
    _Atomic unsigned jobs, phase;
    _Atomic int arrived;
    int closing;
    void (*run)(void *job, int index);
    void *job;
    Member *members;
    pthread_t *threads;
};

// Wait until all threads of the team are here.
static void barrier(Team *team) {
    if (team->count == 1) return;
    unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->count) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int looks = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; looks++) {
        if (looks < team->looks) PAUSE();
        else sched_yield();
    }
}

static void *work(void *argument) {
    Member *member = argument;
    Team *team = member->team;
    unsigned done = 0;
    for (;;) {
        for (int looks = 0; looks < team->looks_for_work; looks++) {
            if (atomic_load_explicit(&team->jobs, memory_order_acquire) != done) break;
            PAUSE();
        }
        if (atomic_load_explicit(&team->jobs, memory_order_acquire) == done) {
            pthread_mutex_lock(&team->lock);
            while (atomic_load(&team->jobs) == done) pthread_cond_wait(&team->work, &team->lock);
            pthread_mutex_unlock(&team->lock);
        }
        done++;
        if (team->closing) return NULL;
        team->run(team->job, member->index);
        barrier(team);
    }
}

static void start_job(Team *team, void (*run)(void *, int), void *job) {
    pthread_mutex_lock(&team->lock);
    team->run = run;
    team->job = job;
    atomic_fetch_add_explicit(&team->jobs, 1, memory_order_release);
    pthread_cond_broadcast(&team->work);
    pthread_mutex_unlock(&team->lock);
}

// Start the threads; how many there are is in `count` afterwards, fewer if the system refuses some.
static void open_team(Team *team, int count, int spinning) {
    memset(team, 0, sizeof *team);
    team->looks = spinning ? LOOKS_SPINNING : LOOKS_YIELDING;
    team->looks_for_work = spinning ? LOOKS_FOR_WORK : 0;
    team->process = getpid();
    pthread_mutex_init(&team->calls, NULL);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->work, NULL);
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
        start_job(team, NULL, NULL);
        for (int i = 1; i < team->count; i++) pthread_join(team->threads[i], NULL);
    }
    free(team->members);
    free(team->threads);
}

// One call at a time may use a team and what belongs to it.
static void take_team(Team *team) {
    if (team->process != getpid()) open_team(team, team->count, team->looks == LOOKS_SPINNING);
    pthread_mutex_lock(&team->calls);
}
static void give_team_back(Team *team) { pthread_mutex_unlock(&team->calls); }

// Run a job by all threads, the calling one among them.
static void run_job(Team *team, void (*run)(void *, int), void *job) {
    if (team->count > 1) start_job(team, run, job);
    run(job, 0);
    barrier(team);
}
