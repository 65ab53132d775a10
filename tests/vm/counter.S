/* A guest that counts, and notices when its memory and its registers are not of one instant.

   Loaded by QEMU's -kernel as a multiboot image. At each tick of the timer (1 kHz) it takes STEPS steps: it checks that
   the page at PAGES + (n % COUNT) * 4096 holds what it wrote there COUNT steps ago, writes n there, and adds 1 to n.
   n is kept in a register and in memory. Every 64 ticks it prints n on the serial port as 8 hexadecimal digits and a
   newline. If anything is not what it must be, it prints BROKEN and halts.
   On the serial port, q switches the machine off and r resets it. */

        .set    PAGES, 0x400000
        .set    COUNTER, 0x300000       /* uint32: n */
        .set    CODE, 0x08
#ifndef COUNT
#define COUNT 512
#endif
#ifndef STEPS
#define STEPS 5
#endif

        .section .text
        .code32
        .globl  _start
        .align  4
header: .long   0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)
        .long   header, header, end, end, _start

_start: cli
        movl    $0x2f0000, %esp
        lgdt    gdt_at
        ljmp    $CODE, $1f
1:      movl    $0x10, %eax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        /* vector 0x20: the timer */
        movl    $tick, %eax
        movw    %ax, idt + 0x20 * 8
        movw    $CODE, idt + 0x20 * 8 + 2
        movw    $0x8e00, idt + 0x20 * 8 + 4
        shrl    $16, %eax
        movw    %ax, idt + 0x20 * 8 + 6
        lidt    idt_at
        /* both interrupt controllers, all but the timer masked */
        movb    $0x11, %al
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $0x20, %al
        outb    %al, $0x21
        movb    $0x28, %al
        outb    %al, $0xa1
        movb    $4, %al
        outb    %al, $0x21
        movb    $2, %al
        outb    %al, $0xa1
        movb    $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $0xfe, %al
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        /* the timer: 1193182 Hz / 1193 */
        movb    $0x34, %al
        outb    %al, $0x43
        movb    $0xa9, %al
        outb    %al, $0x40
        movb    $0x04, %al
        outb    %al, $0x40
        /* what memory holds at first: n - COUNT, as if it had always counted */
        cld
        movl    $PAGES, %edi
        movl    $-COUNT, %eax
        movl    $COUNT, %ecx
2:      movl    %eax, (%edi)
        addl    $4096, %edi
        incl    %eax
        loop    2b
        xorl    %esi, %esi              /* n */
        xorl    %ebp, %ebp              /* ticks */
        xorl    %ebx, %ebx              /* n % COUNT */
        movl    %esi, COUNTER
        sti
3:      hlt
        jmp     3b

tick:   movl    $STEPS, %ecx
4:      cmpl    %esi, COUNTER
        jne     broken
        movl    %ebx, %edi
        shll    $12, %edi
        addl    $PAGES, %edi
        movl    %esi, %eax
        subl    $COUNT, %eax
        cmpl    %eax, (%edi)
        jne     broken
        movl    %esi, (%edi)
        incl    %esi
        incl    COUNTER
        incl    %ebx
        cmpl    $COUNT, %ebx
        jne     5f
        xorl    %ebx, %ebx
5:      loop    4b
        incl    %ebp
        testl   $63, %ebp
        jnz     7f
        movl    %esi, %edx
        movl    $8, %ecx
        movl    %edx, %edi
6:      roll    $4, %edi
        movl    %edi, %eax
        andl    $15, %eax
        movb    digits(%eax), %al
        call    put
        loop    6b
        movb    $10, %al
        call    put
        movw    $0x3fd, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      7f
        movw    $0x3f8, %dx
        inb     %dx, %al
        cmpb    $'q', %al
        je      off
        cmpb    $'r', %al
        je      reset
7:      movb    $0x20, %al
        outb    %al, $0x20
        iret

put:    pushl   %eax
        movw    $0x3fd, %dx
8:      inb     %dx, %al
        testb   $0x20, %al
        jz      8b
        popl    %eax
        movw    $0x3f8, %dx
        outb    %al, %dx
        ret

off:    movw    $0x604, %dx
        movw    $0x2000, %ax
        outw    %ax, %dx
        hlt
reset:  movw    $0xcf9, %dx
        movb    $6, %al
        outb    %al, %dx
        hlt

broken: movl    $said, %edi
9:      movb    (%edi), %al
        testb   %al, %al
        jz      10f
        call    put
        incl    %edi
        jmp     9b
10:     cli
        hlt
        jmp     10b

digits: .ascii  "0123456789abcdef"
said:   .asciz  "BROKEN\n"
        .align  8
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_at: .word   . - gdt - 1
        .long   gdt
idt_at: .word   0x21 * 8 - 1
        .long   idt
        .align  8
idt:    .skip   0x21 * 8
end:
