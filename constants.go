// constants.go: the numbers of the protocols, which all nodes and clients must
// agree on (WIRE.md), and, apart from them, the limits of this implementation.

package main

import "time"

// ---- The protocols ----------------------------------------------------------

// Sizes in bytes (crypto.go).
const (
	saltSize  = 32
	keySize   = 32
	nonceSize = 12
	tagSize   = 16
	// deflateFrom is the size beyond which messages are deflated.
	deflateFrom = 1 << 10
)

const (
	labelRequest label = "agentd/1 request"
	labelReply   label = "agentd/1 reply"
	labelBeat    label = "agentd/1 beat" // NUL and the sender's nodename follow
	labelKeyID   label = "agentd/1 key id"
)

// Beats (crypto.go, beatcodec.go). Sizes in bytes.
const (
	beatVersion  = 0xb1 // type and version
	keyIDSize    = 4
	senderIDSize = 8
	// beatClear is the clear part: the version, key id, sender, key salt, nonce.
	beatClear = 1 + keyIDSize + senderIDSize + 8 + nonceSize
	// beatFixed is what stands sealed before heard bits and records.
	beatFixed = 53
	beatLeast = beatClear + beatFixed + tagSize
	beatLimit = 48 << 10 // of the datagram
	tokenSize = 16       // of a link's token
	// membersLimit is the largest list: one bit of a beat for each.
	membersLimit = 64
	// tokenRate is how many requests a second a link's token has looked at
	// though their sender is shut out.
	tokenRate = 50
)

// Records of beats.
const (
	recordEpoch   = 1
	recordClaims  = 2
	recordRefused = 3
	recordHeld    = 4
	recordChanges = 5
	recordToken   = 6
	recordKeys    = 7
)

// joinCluster stands for the cluster's name in what a joining node sends,
// which does not know the name yet, and in the replies to it.
const joinCluster = "join"

// A plaintext begins with one byte that says how the JSON behind it is stored.
const (
	storedPlain    = 0
	storedDeflated = 1
)

const (
	requestLimit  = 1 << 20  // bytes of a request, sealed and opened
	replyLimit    = 16 << 20 // bytes of an opened frame of a reply
	datagramLimit = 65507    // bytes of UDP's largest payload over IPv4

	// requestDeadline is the time for a request to be complete.
	requestDeadline = 5 * time.Second
	// requestBlanks may stand before a request, and instead of one.
	requestBlanks = "\x00 \t\r\n"
	// dequeueInterval is the least time between two runs for empty packets.
	dequeueInterval = time.Second
)

const (
	// strikes in a row shut a sender out.
	strikes = 5
	// blacklistAge is how long an entry lasts after its last counted message.
	blacklistAge = time.Hour
	// privilegedPorts are those below: an ordinary user cannot send from them.
	privilegedPorts = 1024
	// firstReserved and lastReserved are the ports to send from, those that
	// bindresvport(3) takes too: privileged, and above those of most servers.
	firstReserved, lastReserved = 600, 1023
)

const (
	// A peer that denies is left alone for a while, for a long one after it
	// denied often in a row, well before it counts to strikes.
	deniedPause     = time.Minute
	deniedLongPause = blacklistAge + time.Minute
	deniedOften     = 3
)

// ---- This implementation ----------------------------------------------------

// The listener and its connections.
const (
	// writeDeadline is the time for a client to take a reply; below stopTimeout.
	writeDeadline = 3 * time.Second
	// finishDelay is how long a client may take to close after its reply.
	finishDelay = time.Second
	// datagramsAtOnce bounds the datagrams that are worked on; more are dropped.
	datagramsAtOnce = 64
	// unknownBytes bounds what all unauthenticated requests take together.
	unknownBytes = 8 << 20
	// firstBuffer is what a request begins with; most are smaller.
	firstBuffer = 1 << 10
	// localLimit bounds the connections to the local socket.
	localLimit = 256
	// streamLimit bounds the streams that are served at once.
	streamLimit = 64
	// lettingGo is how long a socket that was replaced still serves what had
	// begun before: the time of a handshake with a lost packet in it.
	lettingGo = 2 * time.Second
	// lastLook is how long a socket's queue is empty until it is let go.
	lastLook = 100 * time.Millisecond
	// bindAgain is the wait before another try to bind a changed address.
	bindAgain = 500 * time.Millisecond
)

// Tables.
const (
	// blacklistSize bounds the blacklist; the oldest entry makes room.
	blacklistSize = 4096
	// saltsKept bounds the table of salts: some 5 MB when it is full.
	saltsKept = 1 << 17
	// saltBucket is how long a part of the window is that is forgotten at
	// once, in ms.
	saltBucket = 10_000
	// storeAhead is how far beyond a message's time the stored bound is set, so
	// that requests cost one write a second, not one each. In ms.
	storeAhead = 1000
	// storePatience is how long a request waits for its bound to be stored.
	storePatience = 500 * time.Millisecond
	// keysKept bounds the file of derived keys: the secret's, the previous
	// one's, and those of join for both, twice.
	keysKept = 8
	// iniSizeLimit bounds a configuration file, in bytes.
	iniSizeLimit = 1 << 20
)

// Heartbeats.
const (
	// beatCiphersKept bounds the ciphers: two keys for each of 64 members, and as
	// many again for those that start anew.
	beatCiphersKept = 256
	// beatsWaiting bounds what the monitor has to take in of heartbeats.
	beatsWaiting = 256
	// beatBuffer is what is asked of the kernel to hold of beats, in bytes.
	beatBuffer = 1 << 20
	// intervalLeast bounds how often beats are sent.
	intervalLeast = 10 * time.Millisecond
	// dialAgain is the wait before a peer's address is looked up again after an
	// error, and staleAgain while nothing is heard of the peer: it may have
	// another address by now.
	dialAgain   = time.Second
	staleAgain  = 10 * time.Second
	dialTimeout = 10 * time.Second
	// faultForgotten is how long beats are sent without an error until it is over.
	faultForgotten = 3 * time.Second
	// keysTrusted is how long the keys count that an accepted beat named; then
	// those of any beat that opens do, until one is accepted again.
	keysTrusted = 10 * time.Second
)

// Service logs.
const (
	// serviceLogSize is the size at which a log is rotated, in bytes. One old
	// file is kept beside it.
	serviceLogSize = 4 << 20
	// logTextSize bounds the text of one entry, logLineSize that of each of its
	// lines, in bytes.
	logTextSize = 64 << 10
	logLineSize = 4 << 10
	// logFrameSize bounds the lines of one frame, in bytes; above the longest
	// line.
	logFrameSize = 64 << 10
	// logBacklog is how much is shown unless asked otherwise, in bytes.
	logBacklog = 10 << 10
	// logAlive is the time between two signs of life to who follows a log.
	logAlive = 5 * time.Second
	// logPatience is how long a node may take to begin with its log, and how
	// long who follows several waits to merge their backlogs.
	logPatience = 5 * time.Second
	// logAgain is the wait before a node that does not answer is asked again.
	logAgain = time.Second
)

// The queue.
const (
	// queueSize bounds the items that wait.
	queueSize = 1000
	// resultsKept bounds the results that are kept, the newest.
	resultsKept = 100
	// itemTimeout ends an item that hangs, so that the next ones run.
	itemTimeout = time.Hour
	// itemOutput bounds what is kept of an item's output, in bytes.
	itemOutput = 64 << 10
	// itemSize bounds the words of one item, in bytes; each counts wordSize more.
	itemSize = 64 << 10
	wordSize = 8
)

// The cluster.
const (
	// maxMembers bounds cluster.nodes: a beat has a bit for each.
	maxMembers = 64
	// beatPause is the least time between beats to one peer that changes cause,
	// unlinkedPause that between answers to one that does not hear this node.
	beatPause     = 5 * time.Millisecond
	unlinkedPause = 50 * time.Millisecond
	// sentKept bounds the beats to one peer that may still be acknowledged.
	sentKept = 2048
	// votesPending bounds the contents of claims that wait for the journal.
	votesPending = 8
	// wakePause is the least time to a wake that is asked for.
	wakePause = time.Millisecond
	// journalPause is the wait before the votes are written again after a fault,
	// stopPause that before an instance without right is stopped again.
	journalPause = time.Second
	// diskPause is that before a daemon without an epoch tries to have one again.
	diskPause = 5 * time.Second
	stopPause = 5 * time.Second
)

// Services.
const (
	// commandOutput bounds what is looked at of a command's output, in bytes.
	commandOutput = 64 << 10
	// outputLine bounds a line of output; a longer one is cut in pieces.
	outputLine = 8 << 10
	// outputRate is how much output of a resource is logged, in bytes a second,
	// beyond outputBurst at once.
	outputRate  = 64 << 10
	outputBurst = 512 << 10
	// outputKept is how large the file of a resource's output grows until it is
	// cut, in bytes.
	outputKept = 1 << 20
	// outputPause is the wait before a flood of output is looked at again.
	outputPause = 200 * time.Millisecond
	// actionsAtOnce and checksAtOnce bound what runs on this node.
	actionsAtOnce = 32
	checksAtOnce  = 64
	// checkIntervalLeast bounds how often a resource is checked.
	checkIntervalLeast = 100 * time.Millisecond
	// calmDelay is when the start of the services is mostly over.
	calmDelay = 20 * time.Second
	// linesWaiting bounds what the monitor has to log and has not yet.
	linesWaiting = 1024
	// rescanPause is the time between two looks at the service files where
	// inotify tells nothing: behind links, on network file systems.
	rescanPause = 10 * time.Second
	// dyingPatience is how long a daemon waits for one that may be ending.
	dyingPatience = 300 * time.Millisecond
	// logOrder is how long an action waits for the log to tell that it begins.
	logOrder = 50 * time.Millisecond
	// lockPause is the wait before another try to lock an instance.
	lockPause = 50 * time.Millisecond
	// waitPause is how often --wait looks when nothing is said, and lastLines how
	// long it waits for what may still be said.
	waitPause = time.Second
	lastLines = 20 * time.Millisecond
	// endPause is the wait before another look whether everything has stopped.
	endPause = 50 * time.Millisecond
	// checkPause is the first wait between checks of what starts or stops; each
	// is twice the one before, up to a second.
	checkPause = 20 * time.Millisecond
)

// The cluster's data.
const (
	// changesSmall is how much of a node's data goes into a beat, in bytes; more
	// is fetched.
	changesSmall = 1200
	// dataSize bounds a node's data, in bytes; each entry counts dataOverhead
	// beside its own. dataKeySize bounds a key.
	dataSize     = 4 << 20
	dataOverhead = 128
	dataKeySize  = 300
	// tombstonesKept bounds the keys that are remembered to be gone.
	tombstonesKept = 256
	// marksSpare is how many superseded marks are kept at least, so that they are
	// not looked for at each change.
	marksSpare = 64
	// fetchTimeout bounds a fetch. fetchPause is the wait after one that failed,
	// doubled each time up to fetchLongPause.
	fetchTimeout   = 5 * time.Second
	fetchPause     = 500 * time.Millisecond
	fetchLongPause = 30 * time.Second
	// dataPause is the least time between two announcements of changed data: a
	// node on which much changes sends a bounded number of beats.
	dataPause = 10 * time.Millisecond
	// statsPause is how often a node says at most what its load is.
	statsPause = 30 * time.Second
)

// The guard.
const (
	// guardIntervalLeast and guardIntervalMost bound the time between two signs
	// of life of the guard.
	guardIntervalLeast = 20 * time.Millisecond
	guardIntervalMost  = time.Second
	// guardHangs is after how long without one it is killed, to start another.
	guardHangs = 5 * time.Second
	// guardStarts is how long it may take until the first.
	guardStarts = 5 * time.Second
	// guardIdle is how long it stays when nothing is held and no daemon runs.
	guardIdle = 10 * time.Second
	// guardAgain is the longest wait before another try of a stop that failed.
	guardAgain = 10 * time.Second
	// guardListSize bounds what is read of the list, in bytes.
	guardListSize = 4 << 20
	// tornReads is how often a record is read that seems to be just written.
	tornReads = 100
)
