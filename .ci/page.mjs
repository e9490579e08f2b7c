// Tests the page in headless Chromium, against a running orderd without a token:
//   node .ci/page.mjs http://localhost:8080 screenshot.png
// playwright-core is found from the directory in PLAYWRIGHT_DIR, or from here.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';

const [url = 'http://localhost:8080', screenshot] = process.argv.slice(2);
const require = createRequire(resolve(process.env.PLAYWRIGHT_DIR ?? '.', 'from.js'));
const { chromium } = require('playwright-core');

const launch = (...args) => chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', ...args],
});
const browser = await launch();
const largeFont = await launch('--blink-settings=defaultFontSize=32'); // 200 % in the browser's settings
let passed = 0, failed = 0;

// check runs one test on a page of its own. Chromium logs every failed request
// as an error: a test that wants some says which statuses.
async function check(name, test, { expect = /^$/, from = browser, ...options } = {}) {
  const context = await from.newContext({ viewport: { width: 1200, height: 800 }, colorScheme: 'light', ...options });
  const page = await context.newPage();
  const errors = [];
  page.on('pageerror', error => errors.push(String(error)));
  page.on('console', message => {
    if (['error', 'warning'].includes(message.type()) && !expect.test(message.text())) errors.push(message.text());
  });
  try {
    page.setDefaultTimeout(20_000);
    await page.addInitScript(() => addEventListener('securitypolicyviolation', e => console.error('CSP violation', e.violatedDirective, e.blockedURI)));
    await test(page);
    assert.deepEqual(errors, [], 'errors in the console');
    passed++;
    console.log(`ok    ${name}`);
  } catch (error) {
    failed++;
    console.log(`FAIL  ${name}\n${error.message.slice(0, 500).replace(/^/gm, '      ')}`);
  } finally {
    await context.close();
  }
}

const hasText = (page, selector, pattern) =>
  page.waitForFunction(([s, p]) => new RegExp(p).test(document.querySelector(s)?.textContent), [selector, pattern.source]);

async function open(page) {
  await page.goto(url);
  await hasText(page, '#link', /^Live$/);
}

// metrics answers in the server's stead, with Prometheus's text.
const metrics = (page, { pending = 0, processing = 0, completed = 0, removed = 0, parked = 0, down }) =>
  page.route('**/metrics*', route => route.fulfill({ contentType: 'text/plain; version=0.0.4; charset=utf-8', body: `
# TYPE orderd_processing_seconds histogram
orderd_processing_seconds_sum ${completed * 2.0012}
orderd_processing_seconds_count ${completed}
orderd_orders{status="Pending"} ${pending}
orderd_orders{status="Processing"} ${processing}
orderd_orders{status="Completed"} ${completed}
orderd_orders_removed_total ${removed}
orderd_orders_parked ${parked}
${down === undefined ? '' : `orderd_endpoint_down ${down}\n`}` }));

await check('the page shows live counts', async page => {
  await open(page);
  assert.deepEqual(await page.locator('#states span').allTextContents(), ['Pending', 'Processing', 'Completed']);
  for (const text of await page.locator('#states b').allTextContents()) assert.match(text, /^[\d,]+$/);
  await page.waitForSelector('#rates .curve', { state: 'attached' });
  assert.match(await page.getAttribute('#rates', 'aria-label'), /^Throughput over the last 1 min: now .+ orders\/s/);
});

await check('the icon is shown', async page => {
  await open(page);
  assert.ok(await page.evaluate(async () => {
    const icon = Object.assign(new Image(), { src: document.querySelector('link[rel=icon]').href });
    await icon.decode(); // fails where the policy forbids it too
    return icon.naturalWidth;
  }) > 0);
});

await check('an order placed by keyboard becomes Completed, its amount sent as typed', async page => {
  await open(page);
  const request = page.waitForRequest(r => r.method() === 'POST');
  await page.focus('#user_id');
  for (const text of ['page "test"', 'tea, <b>cake</b>', '9999999999999.90']) {
    await page.keyboard.press('ControlOrMeta+A');
    await page.keyboard.type(text);
    await page.keyboard.press('Tab');
  }
  await page.keyboard.press('Enter'); // the focus is on the button by now
  const sent = await request;
  assert.equal(sent.postData(), '{"user_id":"page \\"test\\"","item_ids":"tea, <b>cake</b>","total_amount":9999999999999.90}');
  assert.match(await sent.headerValue('Idempotency-Key'), /^[0-9a-f]{32}$/);
  await hasText(page, '#done', /^Order \w{26} is placed\.$/);
  const id = (await page.textContent('#done')).split(' ')[1];
  const row = page.locator('#orders li', { hasText: id });
  await row.locator('.Completed').waitFor();
  assert.match(await row.textContent(), /page "test" tea, <b>cake<\/b>.*9,999,999,999,999\.90/);
});

await check('wrong fields are shown at their places and announced', async page => {
  await open(page);
  await page.fill('#user_id', ' ');
  await page.fill('#total_amount', '1.999');
  await page.press('#total_amount', 'Enter');
  await hasText(page, '#total_amount-error', /at most two decimals/);
  await hasText(page, '#user_id-error', /^this field is required$/);
  await hasText(page, '[role=alert]#failed', /The order was not taken/);
  assert.equal(await page.textContent('#item_ids-error'), '');
  for (const field of ['#user_id', '#total_amount']) {
    assert.equal(await page.getAttribute(field, 'aria-invalid'), 'true');
    assert.ok((await page.getAttribute(field, 'aria-describedby')).split(' ').includes(field.slice(1) + '-error'));
  }
  assert.equal(await page.evaluate(() => document.activeElement.id), 'user_id', 'the focus is on the first wrong field');
  await page.fill('#user_id', 'u'.repeat(129));
  await page.fill('#total_amount', '1,5');
  await page.press('#total_amount', 'Enter');
  await hasText(page, '#total_amount-error', /^must be a number, such as 99\.99$/);
  await hasText(page, '#user_id-error', /^must be 1 to 128 bytes .* not 129$/);
}, { expect: /status of 422/ });

await check('a retry repeats the key, a new order gets another', async page => {
  await open(page);
  const keys = [];
  await page.route('**/orders', async route => {
    keys.push(await route.request().headerValue('Idempotency-Key'));
    await (keys.length === 1 ? route.abort() : route.continue());
  });
  await page.click('#place [type=submit]');
  await hasText(page, '#failed', /^The server does not answer\. Place again once it is back: no order is placed twice\.$/);
  await page.click('#place [type=submit]');
  await hasText(page, '#done', /is placed/);
  await Promise.all([page.waitForResponse(r => r.status() === 201), page.click('#place [type=submit]')]);
  assert.equal(keys[0], keys[1]);
  assert.notEqual(keys[1], keys[2]);
}, { expect: /ERR_FAILED/ });

await check('the page says that the server is gone, and comes back by itself', async page => {
  await open(page);
  await page.route('**/metrics*', route => route.abort());
  await hasText(page, '#link[role=status]', /^The server does not answer\. Trying again\.$/);
  await page.unroute('**/metrics*');
  await hasText(page, '#link', /^Live$/);
}, { expect: /ERR_FAILED/ });

await check('the page tells of orders that are retried, and of an endpoint that is down', async page => {
  await open(page);
  const trouble = (parked, down) => page.waitForFunction(want => JSON.stringify(want) === JSON.stringify([
    document.querySelector('#parked').innerText, document.querySelector('#down[role=status]').innerText]), [parked, down]);
  await trouble('', ''); // what the server itself says
  assert.equal(await page.evaluate(() => document.querySelector('#down').parentElement.offsetHeight), 0, 'no room is kept for nothing');
  await metrics(page, { parked: 1 });
  await trouble('1 order is being retried.', '');
  await metrics(page, { parked: 1234, down: 0 });
  await trouble('1,234 orders are being retried.', '');
  await metrics(page, { down: 1 });
  await trouble('', 'The endpoint that does the work is down; orders wait.');
});

await check('removed orders do not count against the throughput', async page => {
  await metrics(page, { completed: 100 });
  await open(page);
  await hasText(page, '#states', /100/);
  await metrics(page, { completed: 60, removed: 90 });
  await hasText(page, '#states', /60/);
  await hasText(page, '#rate-now', /^[1-9]/);
});

await check('what moves by itself can be paused', async page => {
  let requests = 0;
  await page.route('**/orders?*', route => { requests++; return route.continue(); });
  await metrics(page, {});
  await open(page);
  const dots = page.locator('#dots i');
  await page.evaluate(() => new MutationObserver((_, observer) => { // pauses as soon as the first of the dots move
    observer.disconnect();
    document.querySelector('#pause').click();
  }).observe(document.querySelector('#dots'), { childList: true }));
  await metrics(page, { pending: 60 });
  await hasText(page, '#link[role=status]', /^Paused at \d+:\d\d:\d\d/);
  await page.waitForTimeout(1000); // for a request under way
  const state = () => page.evaluate(() => [document.querySelector('#states').textContent, document.querySelector('#dots').innerHTML, document.querySelector('#orders ol').textContent]);
  const before = [requests, await state()];
  await page.evaluate(() => dispatchEvent(new Event('online')));
  await page.waitForTimeout(2500);
  assert.deepEqual([requests, await state()], before, 'nothing changes');
  assert.ok(await dots.count() < 60, 'the other dots wait');
  assert.equal(await page.textContent('#pause'), 'Resume');
  await page.press('#pause', 'Enter');
  await hasText(page, '#link', /^Live$/);
  assert.equal(await page.textContent('#pause'), 'Pause');
  await dots.nth(59).waitFor();
  assert.ok(requests > before[0]);
});

// guard answers in the server's stead where a request lacks the token.
const guard = where => where.route(/\/(metrics|orders.*)$/, async route => {
  const given = await route.request().headerValue('Authorization');
  if (given === 'Bearer secret') return route.continue();
  await route.fulfill({ status: 401, contentType: 'application/problem+json', body: '{"detail":"Send the token."}' });
});

await check('the page asks for a token and sends it', async page => {
  await guard(page);
  await page.goto(url);
  await hasText(page, '#link', /^Token needed$/);
  assert.equal(await page.evaluate(() => document.activeElement.id), 'token');
  assert.ok(await page.isHidden('footer'), 'a link cannot send the token');
  await page.keyboard.type('wrong');
  await page.keyboard.press('Enter');
  await hasText(page, '#token-error', /did not accept/);
  assert.equal(await page.getAttribute('#token', 'aria-invalid'), 'true');
  await page.click('#place [type=submit]');
  await hasText(page, '#failed', /^Enter the token above/);
  assert.equal(await page.evaluate(() => document.activeElement.id), 'token');
  await page.fill('#token', 'secret');
  await page.press('#token', 'Enter');
  await hasText(page, '#link', /^Live$/);
  assert.ok(await page.isHidden('#door'));
  assert.equal(await page.textContent('#failed'), '');
  assert.ok(await page.isHidden('footer'));
  assert.equal(await page.evaluate(() => document.activeElement.id), 'user_id');
}, { expect: /status of 401/ });

await check('tabs share the token, and only one that the server took', async page => {
  await guard(page.context());
  const tabs = [page, await page.context().newPage()];
  const token = tab => tab.evaluate(() => sessionStorage.getItem('token'));
  for (const tab of tabs) {
    await tab.goto(url);
    await hasText(tab, '#link', /^Token needed$/);
    await tab.fill('#token', 'wrong');
    await tab.press('#token', 'Enter');
    await hasText(tab, '#token-error', /did not accept/);
  }
  const late = await page.context().newPage();
  await late.goto(url);
  await hasText(late, '#link', /^Token needed$/);
  assert.equal(await token(late), null);
  await page.fill('#token', 'secret');
  await page.press('#token', 'Enter');
  tabs.push(late);
  for (const tab of tabs) await hasText(tab, '#link', /^Live$/); // those that were open too
  const next = await page.context().newPage();
  await open(next);
  tabs.push(next);
  for (const tab of tabs) {
    assert.equal(await token(tab), 'secret');
    assert.ok(await tab.isHidden('#door'));
  }
  assert.equal(await page.evaluate(() => localStorage.length + document.cookie.length), 0, 'nothing is kept on disk');
  for (const tab of tabs) {
    await tab.route('**/metrics*', route => route.abort());
    await hasText(tab, '#link', /^The server does not answer/);
  }
  const last = await page.context().newPage();
  await last.goto(url);
  await hasText(last, '#link', /^Token needed$/);
  assert.equal(await token(last), null);
}, { expect: /status of 401|ERR_FAILED/ });

await check('a token that may only read can be changed for another', async page => {
  await page.route(/\/(metrics|orders.*)$/, async route => {
    const given = await route.request().headerValue('Authorization'), post = route.request().method() === 'POST';
    if (given === 'Bearer all' || given === 'Bearer reader' && !post) return route.continue();
    await route.fulfill({ status: given ? 403 : 401, contentType: 'application/problem+json', body: '{"detail":"Forbidden."}' });
  });
  await page.addInitScript(() => sessionStorage.setItem('token', 'reader'));
  await open(page);
  assert.ok(await page.isHidden('#forget'));
  for (const button of ['#place [type=submit]', '#hundred']) {
    await page.click(button);
    await hasText(page, '[role=alert]#failed', /^This token may only read: use another one to place orders\.$/);
    await page.waitForSelector('#place[aria-busy=false]');
  }
  await page.click('#forget');
  await hasText(page, '#link', /^Token needed$/);
  await page.fill('#token', 'all');
  await page.press('#token', 'Enter');
  await hasText(page, '#link', /^Live$/);
  assert.equal(await page.textContent('#failed'), '');
  assert.ok(await page.isHidden('#forget'));
  await page.click('#place [type=submit]');
  await hasText(page, '#done', /is placed/);
}, { expect: /status of 40[13]/ });

for (const [colorScheme, width, from] of [['light', 360], ['dark', 360], ['light', 320], ['light', 1280, largeFont], ['dark', 375, largeFont], ['light', 320, largeFont]]) {
  await check(`nothing is cut off at ${width} pixels, ${colorScheme}${from ? ', at twice the font size' : ''}`, async page => {
    await metrics(page, { pending: 12345678, processing: 100000, completed: 98765432, parked: 10000, down: 1 });
    await open(page);
    await page.locator('#orders li').first().waitFor();
    const sizes = await page.evaluate(() => {
      const box = e => {
        const text = document.createRange();
        text.selectNodeContents(e);
        const boxes = [e.getBoundingClientRect(), text.getBoundingClientRect()];
        return { left: Math.min(...boxes.map(b => b.left)), right: Math.max(...boxes.map(b => b.right)) };
      };
      const outside = (e, { left, right }) => box(e).left < left || box(e).right > right;
      const cut = [...document.querySelectorAll('body *')].filter(e => !e.closest('#dots') &&
        (outside(e, { left: 0, right: innerWidth }) || e.matches('#states li > *, figure text') && outside(e, e.parentElement.getBoundingClientRect())));
      const size = selector => parseFloat(getComputedStyle(document.querySelector(selector)).fontSize);
      return { scroll: document.documentElement.scrollWidth, cut: cut.map(e => e.tagName + '#' + e.id + ' ' + e.textContent.trim().slice(0, 30)),
        fonts: ['body', 'input', 'form button', 'figure text'].map(size), background: getComputedStyle(document.body).backgroundColor };
    });
    assert.equal(sizes.scroll, width);
    assert.deepEqual(sizes.cut, []);
    assert.deepEqual(sizes.fonts, [15, 16, 15, 11.2].map(size => from ? 2 * size : size), 'the fonts follow that of the browser, and no phone zooms in on an input');
    assert.equal(/rgb\((\d+)/.exec(sizes.background)[1] < 128, colorScheme === 'dark');
    if (screenshot && process.env.SCREENSHOTS) await page.screenshot({ path: screenshot.replace(/(\.\w+)$/, `-${width}-${colorScheme}${from ? '-large' : ''}$1`), fullPage: true });
  }, { viewport: { width, height: 740 }, colorScheme, isMobile: width < 1000, from });
}

for (const width of [375, 1280]) {
  await check(`the header never covers what has the focus, at ${width} pixels`, async page => {
    await page.route('**/metrics*', route => route.fulfill({ status: 500, json: { detail: 'The disk is full. '.repeat(5) } }));
    await page.goto(url);
    await hasText(page, '#link', /disk is full/);
    const clear = () => page.evaluate(() => {
      const element = document.activeElement, top = element.getBoundingClientRect().top;
      const header = document.querySelector('header');
      return { id: element.id || element.tagName, clear: header.contains(element) || top >= header.getBoundingClientRect().bottom };
    });
    await page.focus('footer a');
    const seen = [];
    for (let at = await clear(); at.id !== 'user_id'; at = await clear()) {
      seen.push(at.id);
      assert.ok(at.clear, at.id);
      await page.keyboard.press('Shift+Tab');
    }
    assert.ok((await clear()).clear, 'user_id');
    assert.deepEqual(seen, ['A', 'hundred', 'BUTTON', 'total_amount', 'item_ids']);
  }, { viewport: { width, height: 300 }, expect: /status of 500/ });
}

await check('a hundred orders are placed and flow', async page => {
  await open(page);
  await page.click('#hundred');
  await hasText(page, '#done', /^100 orders are placed\.$/);
  await page.waitForFunction(() => document.querySelectorAll('#dots .Pending').length > 3 || document.querySelectorAll('#dots .Completed').length > 50);
  await page.waitForTimeout(12_000); // for the charts to have something to show
  if (screenshot) await page.screenshot({ path: screenshot });
});

await Promise.all([browser.close(), largeFont.close()]);
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed ? 1 : 0;
