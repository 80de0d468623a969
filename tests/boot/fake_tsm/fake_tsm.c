// SPDX-License-Identifier: GPL-2.0-only
/*
 * A provider for the kernel's configfs-tsm that says it is sev_guest, and whose firmware is a program on the host.
 *
 * A test artefact, built by the boot test for the guest it boots. It is under GPL-2.0-only, unlike the rest of this
 * repository, because tsm_register() is exported to GPL modules only; it is no part of the product and never shipped.
 *
 * One report is one request and one answer over a virtio-serial port, in which all numbers are little endian:
 *
 *	request	u32 bytes that follow, 72 | u32 sequence | u32 privlevel | 64 bytes inblob
 *	answer	u32 sequence | u32 errno, 0 = ok | u32 bytes of the report | u32 bytes of the auxblob | report | auxblob
 *
 * The other end is tests/boot/firmware.py. The port is opened for each request and not before: the module loads without it,
 * and before /dev is there. Written for Linux 6.12; 6.16 renamed tsm_register() and struct tsm_ops.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/err.h>
#include <linux/errno.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/tsm.h>
#include <linux/uaccess.h>

#define POLL_MS 5
#define MAX_BLOB (64 << 10) /* more than TSM_OUTBLOB_MAX: what is too much the core says */

static char *port = "/dev/vport0p1";
module_param(port, charp, 0444);
MODULE_PARM_DESC(port, "virtio-serial port to the firmware");

static unsigned int deadline_s = 62;
module_param(deadline_s, uint, 0444);
MODULE_PARM_DESC(deadline_s, "seconds until a report without an answer fails with ETIMEDOUT; 62 is what sev-guest takes");

static bool svsm;
module_param(svsm, bool, 0444);
MODULE_PARM_DESC(svsm, "show what a guest under an SVSM has too");

struct request {
	__le32 bytes;
	__le32 sequence;
	__le32 privlevel;
	u8 inblob[TSM_INBLOB_MAX];
} __packed;

struct answer {
	__le32 sequence;
	__le32 error;
	__le32 report_bytes;
	__le32 auxblob_bytes;
} __packed;

/* An open port, until when to wait for it, and a page of the process that asked for the report. */
struct line {
	struct file *file;
	unsigned long deadline;
	char __user *page;
};

static DEFINE_MUTEX(one_request);
static u32 sequence;

/*
 * Move all of @data, or fail. The port has only ->read() and ->write(), which take user memory, and kernel_read() and
 * kernel_write() refuse such a file: hence the page.
 */
static int move(struct line *line, void *data, size_t bytes, bool to_host)
{
	const struct file_operations *op = line->file->f_op;

	while (bytes) {
		size_t part = min_t(size_t, bytes, PAGE_SIZE);
		loff_t pos = 0;
		ssize_t moved;

		if (to_host && copy_to_user(line->page, data, part))
			return -EFAULT;
		moved = to_host ? op->write(line->file, line->page, part, &pos) : op->read(line->file, line->page, part, &pos);
		if (moved == -EAGAIN) {
			if (vfs_poll(line->file, NULL) & EPOLLHUP) /* nobody at the host's end */
				return -ENXIO;
			if (time_after(jiffies, line->deadline))
				return -ETIMEDOUT;
			schedule_timeout_killable(msecs_to_jiffies(POLL_MS));
			if (fatal_signal_pending(current))
				return -EINTR;
			continue;
		}
		if (moved < 0)
			return moved;
		if (!moved) /* the same, while reading */
			return -ENXIO;
		if (!to_host && copy_from_user(data, line->page, moved))
			return -EFAULT;
		data += moved;
		bytes -= moved;
	}
	return 0;
}

static int receive_blob(struct line *line, u8 **blob, size_t *blob_bytes, u32 bytes)
{
	*blob = kvmalloc(bytes, GFP_KERNEL); /* not NULL for 0 bytes: the core takes that for an empty report, as it should */
	if (!*blob)
		return -ENOMEM;
	*blob_bytes = bytes;
	return move(line, *blob, bytes, false);
}

static void free_blobs(struct tsm_report *report)
{
	kvfree(report->outblob);
	kvfree(report->auxblob);
	report->outblob = NULL;
	report->auxblob = NULL;
	report->outblob_len = 0;
	report->auxblob_len = 0;
}

/* @error is the firmware's word; the return value says whether there was one. */
static int receive_answer(struct line *line, struct tsm_report *report, u32 *answered, u32 *error)
{
	struct answer answer;
	u32 report_bytes, auxblob_bytes;
	int rc;

	rc = move(line, &answer, sizeof(answer), false);
	if (rc)
		return rc;
	*answered = le32_to_cpu(answer.sequence);
	*error = le32_to_cpu(answer.error);
	report_bytes = le32_to_cpu(answer.report_bytes);
	auxblob_bytes = le32_to_cpu(answer.auxblob_bytes);
	if (*error > MAX_ERRNO || report_bytes > MAX_BLOB || auxblob_bytes > MAX_BLOB)
		return -EBADMSG;
	rc = receive_blob(line, &report->outblob, &report->outblob_len, report_bytes);
	return rc ?: receive_blob(line, &report->auxblob, &report->auxblob_len, auxblob_bytes);
}

static int ask(struct line *line, struct tsm_report *report)
{
	struct request request = {
		.bytes = cpu_to_le32(sizeof(request) - sizeof(request.bytes)),
		.sequence = cpu_to_le32(++sequence),
		.privlevel = cpu_to_le32(report->desc.privlevel),
	};
	u32 answered, error;
	int rc;

	memcpy(request.inblob, report->desc.inblob, sizeof(request.inblob));
	rc = move(line, &request, sizeof(request), true);
	if (rc)
		return rc;
	do { /* an answer that somebody before us did not wait for comes first */
		free_blobs(report);
		rc = receive_answer(line, report, &answered, &error);
	} while (!rc && answered != sequence);
	rc = rc ?: -(int)error;
	if (rc)
		free_blobs(report);
	return rc;
}

static int report_new(struct tsm_report *report, void *data)
{
	struct line line = { .deadline = jiffies + deadline_s * HZ };
	unsigned long page;
	int rc;

	if (report->desc.inblob_len != TSM_INBLOB_MAX)
		return -EINVAL;

	guard(mutex)(&one_request);
	line.file = filp_open(port, O_RDWR | O_NONBLOCK | O_CLOEXEC, 0);
	if (IS_ERR(line.file)) {
		pr_warn("%s: open: %ld\n", port, PTR_ERR(line.file));
		return -ENXIO;
	}
	page = vm_mmap(NULL, 0, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, 0);
	if (IS_ERR_VALUE(page)) {
		rc = page;
	} else if (!line.file->f_op->read || !line.file->f_op->write) {
		rc = -ENXIO;
		vm_munmap(page, PAGE_SIZE);
	} else {
		line.page = (char __user *)page;
		rc = ask(&line, report);
		vm_munmap(page, PAGE_SIZE);
	}
	__fput_sync(line.file); /* fput() leaves it to our way out, and till then the port has no room for the next one */
	return rc;
}

/* What the real sev_guest shows, of which a guest without an SVSM has not all. */
static bool attr_visible(int n)
{
	return svsm || n <= TSM_REPORT_PRIVLEVEL_FLOOR;
}

static bool bin_attr_visible(int n)
{
	return svsm || n <= TSM_REPORT_AUXBLOB;
}

static const struct tsm_ops ops = {
	.name = "sev_guest",
	.report_new = report_new,
	.report_attr_visible = attr_visible,
	.report_bin_attr_visible = bin_attr_visible,
};

static int __init fake_tsm_init(void)
{
	return tsm_register(&ops, NULL);
}
module_init(fake_tsm_init);

static void __exit fake_tsm_exit(void)
{
	tsm_unregister(&ops);
}
module_exit(fake_tsm_exit);

MODULE_DESCRIPTION("configfs-tsm provider of a boot test: its firmware is a program on the host");
MODULE_LICENSE("GPL");
