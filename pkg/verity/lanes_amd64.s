#include "textflag.h"

// SHA-256 (FIPS 180-4) of sixteen streams at once, one in each 32-bit element of the registers. It needs
// AVX-512 F and BW.
//
//	Z0 ... Z7    the working variables a to h
//	Z8 ... Z23   the last sixteen words of the message schedule
//	Z24 ... Z28  scratch
//	Z31          the order of bytes that makes words of bytes

// ROUND does one round of 6.2.2, step 3, with the word w and the constant at offset k. The names of the
// variables move on from round to round, not their values: d becomes e, and h becomes a.
#define ROUND(k, a, b, c, d, e, f, g, h, w) \
	VPADDD      w, h, h;              \
	VPRORD      $6, e, Z24;           \
	VPRORD      $11, e, Z25;          \
	VPRORD      $25, e, Z26;          \
	VPADDD.BCST k(R8), h, h;          \
	VMOVDQA64   e, Z27;               \
	VPTERNLOGD  $0xca, g, f, Z27;     \
	VPTERNLOGD  $0x96, Z26, Z25, Z24; \
	VPADDD      Z27, h, h;            \
	VPRORD      $2, a, Z25;           \
	VPRORD      $13, a, Z26;          \
	VPRORD      $22, a, Z27;          \
	VPADDD      Z24, h, h;            \
	VMOVDQA64   a, Z28;               \
	VPTERNLOGD  $0xe8, c, b, Z28;     \
	VPTERNLOGD  $0x96, Z27, Z26, Z25; \
	VPADDD      h, d, d;              \
	VPADDD      Z28, h, h;            \
	VPADDD      Z25, h, h

// SCHEDULE makes of the word w, the sixteenth to last, the next one (6.2.2, step 1).
#define SCHEDULE(w, w1, w9, w14) \
	VPRORD     $7, w1, Z24;          \
	VPRORD     $18, w1, Z25;         \
	VPSRLD     $3, w1, Z26;          \
	VPADDD     w9, w, w;             \
	VPTERNLOGD $0x96, Z26, Z25, Z24; \
	VPRORD     $17, w14, Z25;        \
	VPRORD     $19, w14, Z26;        \
	VPSRLD     $10, w14, Z27;        \
	VPADDD     Z24, w, w;            \
	VPTERNLOGD $0x96, Z27, Z26, Z25; \
	VPADDD     Z25, w, w

// WORDS and PAIRS interleave the words, or the pairs of words, of two rows.
#define WORDS(a, b, low, high) \
	VPUNPCKLDQ b, a, low; \
	VPUNPCKHDQ b, a, high

#define PAIRS(a, b, low, high) \
	VPUNPCKLQDQ b, a, low; \
	VPUNPCKHQDQ b, a, high

// QUARTERS takes the even quarters of two rows, and the odd ones.
#define QUARTERS(a, b, even, odd) \
	VSHUFI32X4 $0x88, b, a, even; \
	VSHUFI32X4 $0xdd, b, a, odd

// LOAD loads the next 64 bytes of a stream.
#define LOAD(stream, row) \
	MOVQ      (8*stream)(SI), R9; \
	VMOVDQU64 (R9)(DX*1), row

// func blocks16(s *state, streams *[lanes]*byte, n int)
TEXT ·blocks16(SB), NOSPLIT, $0-24
	MOVQ      s+0(FP), AX
	MOVQ      streams+8(FP), SI
	MOVQ      n+16(FP), CX
	LEAQ      roundConstants<>(SB), R8
	XORQ      DX, DX

next:
	TESTQ CX, CX
	JLE   done

	// Row i becomes stream i's sixteen words, column j the word j of all streams.
	LOAD(0, Z8)
	LOAD(1, Z9)
	LOAD(2, Z10)
	LOAD(3, Z11)
	LOAD(4, Z12)
	LOAD(5, Z13)
	LOAD(6, Z14)
	LOAD(7, Z15)
	LOAD(8, Z16)
	LOAD(9, Z17)
	LOAD(10, Z18)
	LOAD(11, Z19)
	LOAD(12, Z20)
	LOAD(13, Z21)
	LOAD(14, Z22)
	LOAD(15, Z23)
	VBROADCASTI32X4 wordBytes<>(SB), Z31
	VPSHUFB Z31, Z8, Z8
	VPSHUFB Z31, Z9, Z9
	VPSHUFB Z31, Z10, Z10
	VPSHUFB Z31, Z11, Z11
	VPSHUFB Z31, Z12, Z12
	VPSHUFB Z31, Z13, Z13
	VPSHUFB Z31, Z14, Z14
	VPSHUFB Z31, Z15, Z15
	VPSHUFB Z31, Z16, Z16
	VPSHUFB Z31, Z17, Z17
	VPSHUFB Z31, Z18, Z18
	VPSHUFB Z31, Z19, Z19
	VPSHUFB Z31, Z20, Z20
	VPSHUFB Z31, Z21, Z21
	VPSHUFB Z31, Z22, Z22
	VPSHUFB Z31, Z23, Z23
	WORDS(Z8, Z9, Z0, Z1)
	WORDS(Z10, Z11, Z2, Z3)
	WORDS(Z12, Z13, Z4, Z5)
	WORDS(Z14, Z15, Z6, Z7)
	WORDS(Z16, Z17, Z24, Z25)
	WORDS(Z18, Z19, Z26, Z27)
	WORDS(Z20, Z21, Z28, Z29)
	WORDS(Z22, Z23, Z30, Z31)
	PAIRS(Z0, Z2, Z8, Z9)
	PAIRS(Z1, Z3, Z10, Z11)
	PAIRS(Z4, Z6, Z12, Z13)
	PAIRS(Z5, Z7, Z14, Z15)
	PAIRS(Z24, Z26, Z16, Z17)
	PAIRS(Z25, Z27, Z18, Z19)
	PAIRS(Z28, Z30, Z20, Z21)
	PAIRS(Z29, Z31, Z22, Z23)
	QUARTERS(Z8, Z12, Z0, Z2)
	QUARTERS(Z16, Z20, Z1, Z3)
	QUARTERS(Z9, Z13, Z4, Z6)
	QUARTERS(Z17, Z21, Z5, Z7)
	QUARTERS(Z10, Z14, Z24, Z26)
	QUARTERS(Z18, Z22, Z25, Z27)
	QUARTERS(Z11, Z15, Z28, Z30)
	QUARTERS(Z19, Z23, Z29, Z31)
	QUARTERS(Z0, Z1, Z8, Z16)
	QUARTERS(Z2, Z3, Z12, Z20)
	QUARTERS(Z4, Z5, Z9, Z17)
	QUARTERS(Z6, Z7, Z13, Z21)
	QUARTERS(Z24, Z25, Z10, Z18)
	QUARTERS(Z26, Z27, Z14, Z22)
	QUARTERS(Z28, Z29, Z11, Z19)
	QUARTERS(Z30, Z31, Z15, Z23)

	VMOVDQU64 0(AX), Z0
	VMOVDQU64 64(AX), Z1
	VMOVDQU64 128(AX), Z2
	VMOVDQU64 192(AX), Z3
	VMOVDQU64 256(AX), Z4
	VMOVDQU64 320(AX), Z5
	VMOVDQU64 384(AX), Z6
	VMOVDQU64 448(AX), Z7

	ROUND(0, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8)
	SCHEDULE(Z8, Z9, Z17, Z22)
	ROUND(4, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z9)
	SCHEDULE(Z9, Z10, Z18, Z23)
	ROUND(8, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z10)
	SCHEDULE(Z10, Z11, Z19, Z8)
	ROUND(12, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z11)
	SCHEDULE(Z11, Z12, Z20, Z9)
	ROUND(16, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z12)
	SCHEDULE(Z12, Z13, Z21, Z10)
	ROUND(20, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z13)
	SCHEDULE(Z13, Z14, Z22, Z11)
	ROUND(24, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z14)
	SCHEDULE(Z14, Z15, Z23, Z12)
	ROUND(28, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z15)
	SCHEDULE(Z15, Z16, Z8, Z13)
	ROUND(32, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z16)
	SCHEDULE(Z16, Z17, Z9, Z14)
	ROUND(36, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z17)
	SCHEDULE(Z17, Z18, Z10, Z15)
	ROUND(40, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z18)
	SCHEDULE(Z18, Z19, Z11, Z16)
	ROUND(44, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z19)
	SCHEDULE(Z19, Z20, Z12, Z17)
	ROUND(48, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z20)
	SCHEDULE(Z20, Z21, Z13, Z18)
	ROUND(52, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z21)
	SCHEDULE(Z21, Z22, Z14, Z19)
	ROUND(56, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z22)
	SCHEDULE(Z22, Z23, Z15, Z20)
	ROUND(60, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z23)
	SCHEDULE(Z23, Z8, Z16, Z21)
	ROUND(64, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8)
	SCHEDULE(Z8, Z9, Z17, Z22)
	ROUND(68, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z9)
	SCHEDULE(Z9, Z10, Z18, Z23)
	ROUND(72, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z10)
	SCHEDULE(Z10, Z11, Z19, Z8)
	ROUND(76, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z11)
	SCHEDULE(Z11, Z12, Z20, Z9)
	ROUND(80, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z12)
	SCHEDULE(Z12, Z13, Z21, Z10)
	ROUND(84, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z13)
	SCHEDULE(Z13, Z14, Z22, Z11)
	ROUND(88, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z14)
	SCHEDULE(Z14, Z15, Z23, Z12)
	ROUND(92, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z15)
	SCHEDULE(Z15, Z16, Z8, Z13)
	ROUND(96, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z16)
	SCHEDULE(Z16, Z17, Z9, Z14)
	ROUND(100, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z17)
	SCHEDULE(Z17, Z18, Z10, Z15)
	ROUND(104, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z18)
	SCHEDULE(Z18, Z19, Z11, Z16)
	ROUND(108, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z19)
	SCHEDULE(Z19, Z20, Z12, Z17)
	ROUND(112, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z20)
	SCHEDULE(Z20, Z21, Z13, Z18)
	ROUND(116, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z21)
	SCHEDULE(Z21, Z22, Z14, Z19)
	ROUND(120, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z22)
	SCHEDULE(Z22, Z23, Z15, Z20)
	ROUND(124, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z23)
	SCHEDULE(Z23, Z8, Z16, Z21)
	ROUND(128, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8)
	SCHEDULE(Z8, Z9, Z17, Z22)
	ROUND(132, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z9)
	SCHEDULE(Z9, Z10, Z18, Z23)
	ROUND(136, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z10)
	SCHEDULE(Z10, Z11, Z19, Z8)
	ROUND(140, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z11)
	SCHEDULE(Z11, Z12, Z20, Z9)
	ROUND(144, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z12)
	SCHEDULE(Z12, Z13, Z21, Z10)
	ROUND(148, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z13)
	SCHEDULE(Z13, Z14, Z22, Z11)
	ROUND(152, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z14)
	SCHEDULE(Z14, Z15, Z23, Z12)
	ROUND(156, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z15)
	SCHEDULE(Z15, Z16, Z8, Z13)
	ROUND(160, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z16)
	SCHEDULE(Z16, Z17, Z9, Z14)
	ROUND(164, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z17)
	SCHEDULE(Z17, Z18, Z10, Z15)
	ROUND(168, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z18)
	SCHEDULE(Z18, Z19, Z11, Z16)
	ROUND(172, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z19)
	SCHEDULE(Z19, Z20, Z12, Z17)
	ROUND(176, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z20)
	SCHEDULE(Z20, Z21, Z13, Z18)
	ROUND(180, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z21)
	SCHEDULE(Z21, Z22, Z14, Z19)
	ROUND(184, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z22)
	SCHEDULE(Z22, Z23, Z15, Z20)
	ROUND(188, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z23)
	SCHEDULE(Z23, Z8, Z16, Z21)
	ROUND(192, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z8)
	ROUND(196, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z9)
	ROUND(200, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z10)
	ROUND(204, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z11)
	ROUND(208, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z12)
	ROUND(212, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z13)
	ROUND(216, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z14)
	ROUND(220, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z15)
	ROUND(224, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z16)
	ROUND(228, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z17)
	ROUND(232, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z5, Z18)
	ROUND(236, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z4, Z19)
	ROUND(240, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z3, Z20)
	ROUND(244, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z2, Z21)
	ROUND(248, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z1, Z22)
	ROUND(252, Z1, Z2, Z3, Z4, Z5, Z6, Z7, Z0, Z23)

	VPADDD    0(AX), Z0, Z0
	VMOVDQU64 Z0, 0(AX)
	VPADDD    64(AX), Z1, Z1
	VMOVDQU64 Z1, 64(AX)
	VPADDD    128(AX), Z2, Z2
	VMOVDQU64 Z2, 128(AX)
	VPADDD    192(AX), Z3, Z3
	VMOVDQU64 Z3, 192(AX)
	VPADDD    256(AX), Z4, Z4
	VMOVDQU64 Z4, 256(AX)
	VPADDD    320(AX), Z5, Z5
	VMOVDQU64 Z5, 320(AX)
	VPADDD    384(AX), Z6, Z6
	VMOVDQU64 Z6, 384(AX)
	VPADDD    448(AX), Z7, Z7
	VMOVDQU64 Z7, 448(AX)
	ADDQ $64, DX
	DECQ CX
	JMP  next

done:
	VZEROUPPER
	RET

DATA wordBytes<>+0(SB)/8, $0x0405060700010203
DATA wordBytes<>+8(SB)/8, $0x0c0d0e0f08090a0b
GLOBL wordBytes<>(SB), RODATA|NOPTR, $16

// The constants of 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
DATA roundConstants<>+0(SB)/8, $0x71374491428a2f98
DATA roundConstants<>+8(SB)/8, $0xe9b5dba5b5c0fbcf
DATA roundConstants<>+16(SB)/8, $0x59f111f13956c25b
DATA roundConstants<>+24(SB)/8, $0xab1c5ed5923f82a4
DATA roundConstants<>+32(SB)/8, $0x12835b01d807aa98
DATA roundConstants<>+40(SB)/8, $0x550c7dc3243185be
DATA roundConstants<>+48(SB)/8, $0x80deb1fe72be5d74
DATA roundConstants<>+56(SB)/8, $0xc19bf1749bdc06a7
DATA roundConstants<>+64(SB)/8, $0xefbe4786e49b69c1
DATA roundConstants<>+72(SB)/8, $0x240ca1cc0fc19dc6
DATA roundConstants<>+80(SB)/8, $0x4a7484aa2de92c6f
DATA roundConstants<>+88(SB)/8, $0x76f988da5cb0a9dc
DATA roundConstants<>+96(SB)/8, $0xa831c66d983e5152
DATA roundConstants<>+104(SB)/8, $0xbf597fc7b00327c8
DATA roundConstants<>+112(SB)/8, $0xd5a79147c6e00bf3
DATA roundConstants<>+120(SB)/8, $0x1429296706ca6351
DATA roundConstants<>+128(SB)/8, $0x2e1b213827b70a85
DATA roundConstants<>+136(SB)/8, $0x53380d134d2c6dfc
DATA roundConstants<>+144(SB)/8, $0x766a0abb650a7354
DATA roundConstants<>+152(SB)/8, $0x92722c8581c2c92e
DATA roundConstants<>+160(SB)/8, $0xa81a664ba2bfe8a1
DATA roundConstants<>+168(SB)/8, $0xc76c51a3c24b8b70
DATA roundConstants<>+176(SB)/8, $0xd6990624d192e819
DATA roundConstants<>+184(SB)/8, $0x106aa070f40e3585
DATA roundConstants<>+192(SB)/8, $0x1e376c0819a4c116
DATA roundConstants<>+200(SB)/8, $0x34b0bcb52748774c
DATA roundConstants<>+208(SB)/8, $0x4ed8aa4a391c0cb3
DATA roundConstants<>+216(SB)/8, $0x682e6ff35b9cca4f
DATA roundConstants<>+224(SB)/8, $0x78a5636f748f82ee
DATA roundConstants<>+232(SB)/8, $0x8cc7020884c87814
DATA roundConstants<>+240(SB)/8, $0xa4506ceb90befffa
DATA roundConstants<>+248(SB)/8, $0xc67178f2bef9a3f7
GLOBL roundConstants<>(SB), RODATA|NOPTR, $256
