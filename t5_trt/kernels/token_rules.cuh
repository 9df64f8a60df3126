// How a token of a row is chosen, as t5_trt/generation/token_rules.py packs it.
#pragma once
#include "launch.cuh"

struct Rules {
    double penalty, divisor;  // of tokens that the row has: scores below 0 times the first, others `divided` by the second; 1: none
    double until;             // end tokens are hidden while the row has fewer tokens
    double temperature;       // by which scores are `divided`
    double top_p;             // 1: all tokens
    long long ngram;          // tokens of an n-gram that must not come twice; 0: none
    long long top_k;          // 0: all tokens
    long long draws;          // 0: the best token
    long long place;          // of the row among the scores; -1: that of its CTA
    long long length;         // tokens of the row; -1: one more than `position`
    long long slot;           // of the row's tokens among `tokens`; -1: that of its CTA
    long long first;          // the token that a row of one token has, if it is not yet among `tokens`; -1: it is
    unsigned long long seed, offset;  // of torch's generator, where there are no variates
};

// The rules of this CTA's row, of which all rows may have the same.
__device__ inline const Rules& own_rules(const Rules* rules, int by_row) { return rules[by_row ? blockIdx.x : 0]; }
__device__ inline long long place_of(const Rules& rules) { return rules.place < 0 ? blockIdx.x : rules.place; }

// What torch's division of a tensor by a number gives: on a GPU it multiplies by the reciprocal, which is what the host then gives.
#ifndef DIVIDES
#define DIVIDES 0
#endif
__device__ inline float divided(float value, float operand) { return DIVIDES ? value / operand : value * operand; }
